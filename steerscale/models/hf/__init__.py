"""Models to and from Hugging Face directories (config.json and safetensors).

- `families`: FAMILIES, `config_from_hf`
- `load`: `load_hf`, sharded: each rank reads its own slices
- `export`: `export_hf` from a model on its ranks, `write_hf` from whole parameters
- `recipes`: where our parameters lie in the files, one table for both ways; `llama`, `gpt2`: a family each
"""
