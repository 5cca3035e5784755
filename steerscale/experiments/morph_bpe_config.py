"""What the experiment with morphological BPE can be told."""

from dataclasses import dataclass

from steerscale.config import require
from steerscale.experiments.stages import ExperimentConfig
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Texts of one language, a document a line; compressed or not."""

    corpus: str
    """File to train on, and to hold out from."""
    out_of_domain: str
    """File of another kind of text; its lines are left out of the corpus."""
    gold: str | None = None
    """Gold morphemes, a word, a tab and its morphemes a line, to score the tokenizers against; null: they are not."""


@dataclass(frozen=True, kw_only=True)
class MorphBPEConfig(ExperimentConfig):
    """The experiment: the same GPT on the same text, cut by several tokenizers."""

    data_dir: str = "../shared/data"
    """Where the files of `languages` are, for them to refer to."""
    languages: dict[str, LanguageConfig]
    """Name -> its texts."""
    tokenizers: dict[str, TokenizerConfig]
    """Name -> how it is trained; all of one vocabulary size. Morfessor learns once for each language."""
    text_bytes: int
    """Bytes of each corpus, drawn by lines, that tokenizers learn from and training samples from."""
    held_out_bytes: int
    """Bytes of each held-out text, drawn by lines."""
    seen_bytes: int
    """Bytes of text each GPT is trained on, whatever the number of tokens."""
    sequence_bytes: int
    """Bytes of a sequence on average: model.seq_len is as many tokens as that are, so that all GPTs see as much text at once,
    and take as many steps."""
    seeds: int = 3
    """GPTs for each language and tokenizer, with other initial weights and another order of the samples."""
    gpt: RunConfig
    """The training run; its data, sequence length, steps and seed are the experiment's to set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_bytes", "held_out_bytes", "seen_bytes", "sequence_bytes", "seeds"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(bool(self.languages), "languages is empty: give one at least")
        require(len(self.tokenizers) > 1, "tokenizers: give two at least, they are to be compared")
        sizes = {name: tokenizer.vocab_size for name, tokenizer in self.tokenizers.items()}
        require(len(set(sizes.values())) == 1, f"tokenizers.*.vocab_size must all be the same, got {sizes}")
