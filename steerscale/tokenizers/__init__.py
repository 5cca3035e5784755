"""Text <-> token numbers.

- `registry`: TOKENIZERS, `load_tokenizer`, `train_tokenizer`
- `base`: the interface every tokenizer has
- `spm`: sentencepiece unigram and BPE; `huggingface`: a tokenizer directory of a Hugging Face model
- `directory`: directories that appear as a whole or not at all
"""
