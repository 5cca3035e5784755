"""What it costs to store activations, and what it costs to make them when they are needed. Torch-free.

Counted as `planning.flops` counts: matrix products only, each token attending to its own past.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steerscale.config import require
from steerscale.models.config import ModelConfig
from steerscale.models.hook_points import hook_point
from steerscale.planning.flops import forward_flops_per_token

TB = 10**12
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """Of `tokens` tokens at some hook points of a model."""

    tokens: int
    bytes_per_hook: int
    """Of one hook point's activations, stored: tokens x d_model x bytes of a number."""
    stored_bytes: int
    """Of all hook points together."""
    price_per_hook: float | None
    """Of storing one hook point, in the currency and for the time of the price; None: no price given."""
    price: float | None
    """Of storing all."""
    layers: int
    """Blocks a streamed token goes through: to the last hook point."""
    forward_flops_per_token: int
    """Of one streamed token: these blocks, no output head. One pass serves all hook points."""
    forward_flops: int
    """Of all tokens."""


def stream_cost(
    model: ModelConfig, hooks: Sequence[str], *, tokens: int, dtype: str = "fp32", price_per_tb: float | None = None
) -> StreamCost:
    """Cost of `tokens` activation vectors at each of `hooks`.

    A block that the last hook point lies inside of counts as a whole; before a block, as not begun. Sequences are
    `model.seq_len` long.

    Args:
        price_per_tb: of 10^12 bytes, for whatever time it is meant.
    Raises:
        ConfigError: an unknown hook point or dtype, or a number that is not positive.
    """
    require(bool(hooks), "name at least one hook point, like blocks.3.hook_resid_post")
    require(tokens > 0, f"the number of tokens must be positive, got {tokens}")
    require(dtype in DTYPE_BYTES, f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    require(price_per_tb is None or price_per_tb >= 0, f"the price of a TB must not be negative, got {price_per_tb}")
    points = [hook_point(name, model) for name in hooks]
    layers = max(point.layer + (point.kind != "hook_resid_pre") for point in points)
    flops = forward_flops_per_token(model, vocab_size=0)
    per_token = (flops.matrices + flops.attention) // model.num_layers * layers
    per_hook = tokens * model.d_model * DTYPE_BYTES[dtype]
    price = None if price_per_tb is None else per_hook / TB * price_per_tb
    return StreamCost(
        tokens=tokens,
        bytes_per_hook=per_hook,
        stored_bytes=per_hook * len(points),
        price_per_hook=price,
        price=None if price is None else price * len(points),
        layers=layers,
        forward_flops_per_token=per_token,
        forward_flops=per_token * tokens,
    )


def with_seq_len(model: ModelConfig, seq_len: int | None) -> ModelConfig:
    """The model on sequences of `seq_len` tokens; None: as long as it was made for."""
    return model if seq_len is None else replace(model, seq_len=seq_len)
