"""Models whose numbers are published or worked out by hand."""

from steerscale.models.config import ModelConfig

GELU = ModelConfig(num_layers=2, d_model=8, num_heads=2, seq_len=16, vocab_size=100)
"""Multi-head attention, learned positions, biases, LayerNorm, tied; 100 tokens padded to 128."""

SWIGLU = ModelConfig(
    num_layers=2,
    d_model=8,
    num_heads=4,
    num_kv_groups=2,
    d_head=4,
    d_ff=12,
    seq_len=16,
    vocab_size=100,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
"""Grouped queries, heads of width 4 where d_model / num_heads is 2, gated MLP, no biases, untied."""

TEUKEN_LIKE = ModelConfig(
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_groups=2,
    d_ff=13440,
    seq_len=4096,
    vocab_size=250680,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)
"""Two key/value groups, SwiGLU and a vocabulary for all official languages of the EU."""


def gpt3(num_layers: int, d_model: int, *, dropout: float = 0.0) -> ModelConfig:
    """A GPT as in the papers on Megatron: heads of 128, 2048 tokens, a vocabulary of 51200."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=d_model // 128,
        seq_len=2048,
        vocab_size=51200,
        dropout=dropout,
        attention_dropout=dropout,
    )


LEAST_RECOMPUTATION: list[tuple[int, int, str | None]] = [
    (1, 1, None),
    (1, 2, "full"),
    (1, 4, "selective"),
    (1, 8, "selective"),
    (2, 1, "selective"),
    (2, 2, "selective"),
    (2, 4, "selective"),
    (4, 1, "none"),
    (4, 2, "none"),
    (4, 4, "none"),
    (8, 1, "none"),
    (8, 2, "none"),
    (16, 1, "none"),
]
"""(tensor, pipeline, least recomputation): GPT-3 6.7B on 16 GPUs of 40 GB, ZeRO-1, MBS 2, GAS 128; None: none is enough."""
