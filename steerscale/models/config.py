"""The shape of a decoder-only language model. Torch-free: planners and dry runs read it too."""

from dataclasses import dataclass
from typing import Literal

from steerscale.config import require

Recompute = Literal["none", "pointwise", "selective", "full"]
"""What the backward pass computes again instead of keeping it: nothing, norms and activation functions, the core attention
(scores, softmax, values), or each block."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-style decoder. Widths are in units (not bytes); `None` means derived, see the properties."""

    num_layers: int
    """Transformer blocks."""
    d_model: int
    """Width of the residual stream."""
    num_heads: int
    """Attention (query) heads."""
    seq_len: int
    """Longest sequence in tokens; training uses sequences of exactly this length."""
    vocab_size: int | None = None
    """Tokens the tokenizer knows; None takes it from the dataset."""
    num_kv_groups: int | None = None
    """Key/value heads shared by query heads (GQA); None: one per query head (MHA)."""
    d_head: int | None = None
    """Width of one head; None: d_model / num_heads."""
    d_ff: int | None = None
    """Hidden width of the MLP; None: 4 d_model."""
    position: Literal["learned", "rotary"] = "learned"
    """Learned absolute positions, or rotary embeddings."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Pre-norm of every sub-layer and the final norm."""
    norm_eps: float = 1e-5
    """Added to the variance before the square root."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """MLP activation; swiglu is gated (three weight matrices)."""
    bias: bool = True
    """Biases in the attention output and MLP projections, and in QKV unless `qkv_bias` says otherwise."""
    qkv_bias: bool | None = None
    """Biases in the QKV projection; None: as `bias`."""
    tie_embeddings: bool = True
    """The output head shares the token embedding's weight."""
    dropout: float = 0.0
    """After the embedding and after each sub-layer."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections use init_std / sqrt(2 num_layers)."""
    pad_vocab_to: int = 128
    """The embedding is padded to a multiple of this, independent of the layout; padding never enters the softmax."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "seq_len", "pad_vocab_to"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        for name in ("vocab_size", "num_kv_groups", "d_head", "d_ff"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} must be positive or null, got {value}")
        require(
            self.d_head is not None or self.d_model % self.num_heads == 0,
            f"model.num_heads must divide model.d_model: {self.num_heads} does not divide {self.d_model} "
            "(or set model.d_head)",
        )
        require(
            self.num_heads % self.kv_groups == 0,
            f"model.num_kv_groups must divide model.num_heads: {self.kv_groups} does not divide {self.num_heads}",
        )
        require(
            self.position != "rotary" or self.head_width % 2 == 0,
            f"model.position=rotary needs an even head width, got {self.head_width}",
        )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"model.{name} must be in [0, 1), got {value}")
        require(self.norm_eps > 0, f"model.norm_eps must be positive, got {self.norm_eps}")
        require(self.init_std > 0, f"model.init_std must be positive, got {self.init_std}")
        require(self.rope_theta > 0, f"model.rope_theta must be positive, got {self.rope_theta}")

    @property
    def kv_groups(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.num_kv_groups is None else self.num_kv_groups

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads if self.d_head is None else self.d_head

    @property
    def ffn_width(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate (a third weight matrix)."""
        return self.activation == "swiglu"

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the QKV projection has biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def tokens(self) -> int:
        """The vocabulary's size; raises ConfigError while it is still unknown."""
        require(
            self.vocab_size is not None,
            "model.vocab_size is not known yet: give it, or data.path of a prepared dataset to take it from",
        )
        return self.vocab_size  # type: ignore[return-value]

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of `pad_vocab_to`."""
        return -(-self.tokens // self.pad_vocab_to) * self.pad_vocab_to

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters of the whole model by its formula, padding rows of the vocabulary included.

        Args:
            embeddings: count token and position embeddings and an untied head; False is Kaplan's non-embedding N.
        """
        h, f, a, g, d = self.d_model, self.ffn_width, self.num_heads, self.kv_groups, self.head_width
        norm = h if self.norm == "rmsnorm" else 2 * h
        attention = h * (a + 2 * g) * d + a * d * h
        mlp = (3 if self.gated else 2) * h * f
        biases = (a + 2 * g) * d if self.has_qkv_bias else 0
        if self.bias:
            biases += h + (2 if self.gated else 1) * f + h
        total = self.num_layers * (attention + mlp + biases + 2 * norm) + norm
        if embeddings:
            total += self.padded_vocab * h * (1 if self.tie_embeddings else 2)
            total += self.seq_len * h if self.position == "learned" else 0
        return total
