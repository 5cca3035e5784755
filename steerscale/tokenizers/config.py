"""What a user can choose when training a tokenizer."""

from dataclasses import dataclass, field

from steerscale.config import require

SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
"""Every trained tokenizer has these four, as ids 0 to 3. eos ends a document; none of them is produced from text."""
MORPH = "morph_bpe"
DEFAULT_BIAS, DEFAULT_SEGMENTATION = 0.9, "morfessor"
DEFAULT_COVERAGE = 0.9995


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to be trained."""

    type: str = "unigram"
    """A key of TOKENIZERS that can be trained: unigram, bpe or morph_bpe."""
    vocab_size: int = 16384
    """Tokens in all: the learned ones, 256 bytes, the four of SPECIAL and `special`."""
    character_coverage: float = DEFAULT_COVERAGE
    """Share of the corpus' characters that get a token of their own; the rest is spelled in bytes. Not for morph_bpe, which
    begins with bytes."""
    bias: float | None = None
    """morph_bpe: how much less a pair of tokens counts where a morpheme boundary lies between them; 0: plain BPE, 1: no merge
    across a boundary; null: 0.9."""
    segmentation: str | None = None
    """morph_bpe: where the boundaries are from. morfessor (null): learned from the corpus; lexicon:FILE: a published lexicon;
    FILE.tsv: a word, a tab and its morphemes a line."""
    special: list[str] = field(default_factory=list)
    """Further texts that are always one token, e.g. <|user|>. Unlike those of SPECIAL they are recognised in text."""
    input_sentence_size: int = 0
    """Learn from this many randomly chosen lines; 0: from all of them."""
    seed: int = 0
    """Chooses the lines under `input_sentence_size`."""

    def __post_init__(self) -> None:
        smallest = 256 + len(SPECIAL) + len(self.special)
        require(
            self.vocab_size > smallest,
            f"tokenizer.vocab_size={self.vocab_size} leaves nothing to learn: 256 bytes, {len(SPECIAL)} control tokens "
            f"and {len(self.special)} special ones are always in; choose more than {smallest}",
        )
        require(
            0 < self.character_coverage <= 1,
            f"tokenizer.character_coverage must be in (0, 1], got {self.character_coverage}",
        )
        require(
            self.input_sentence_size >= 0,
            f"tokenizer.input_sentence_size must be at least 0, got {self.input_sentence_size}",
        )
        require(0 <= self.seed < 2**32, f"tokenizer.seed must be in [0, 2^32), got {self.seed}")
        self._check_morph()
        for text in self.special:
            require(
                bool(text) and text not in SPECIAL.values() and not any(c.isspace() or c in "▁," for c in text),
                f"tokenizer.special: {text!r} cannot be a special token: it must not be empty, hold white space, a "
                f"comma or '▁', or be one of {', '.join(SPECIAL.values())}",
            )
        require(len(set(self.special)) == len(self.special), f"tokenizer.special names a token twice: {self.special}")

    def _check_morph(self) -> None:
        if self.type != MORPH:
            for name in ("bias", "segmentation"):
                value = getattr(self, name)
                require(value is None, f"tokenizer.{name}={value} is for type {MORPH}, not for {self.type}")
            return
        require(
            self.bias is None or 0 <= self.bias <= 1,
            f"tokenizer.bias must be between 0 (plain BPE) and 1 (no merge across a boundary), got {self.bias}",
        )
        require(
            self.bias != 0 or self.segmentation is None,
            f"tokenizer.segmentation={self.segmentation} has no effect at tokenizer.bias=0: leave one of them out",
        )
        require(
            self.character_coverage == DEFAULT_COVERAGE,
            f"tokenizer.character_coverage has no meaning for {MORPH}: it begins with bytes, and needs no character",
        )
        for text in self.special:
            # A vocabulary of bytes writes other signs otherwise, and a single one is there already.
            require(
                len(text) > 1 and text.isascii() and text.isprintable(),
                f"tokenizer.special: {text!r} cannot be a special token of {MORPH}: at least two characters, all ASCII",
            )
