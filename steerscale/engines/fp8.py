"""Where training in 8 bits is possible. Torch-free.

Transformer Engine multiplies fp8 operands only if both sides of each are multiples of 16; a layer's dimensions, cut over the
tensor ranks, and the tokens that a rank multiplies at a time have to be.
"""

from typing import Literal

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout

Fp8 = Literal["none", "hybrid", "e4m3"]
MULTIPLE = 16
LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability of the first devices with FP8 units: Ada Lovelace; Hopper is 9.0."""


def check_fp8(fp8: Fp8, *, engine: str, precision: str, kernels: str) -> None:
    """Whether the engine's other settings go with `fp8`. Raises ConfigError."""
    if fp8 == "none":
        return
    key = f"engine.fp8={fp8}"
    require(engine == "megatron", f"{key} needs engine=megatron, got engine={engine}; or leave engine.fp8 at none")
    require(
        kernels in ("auto", "te"),
        f"{key} needs Transformer Engine's linear layers, got engine.kernels={kernels}: set engine.kernels=te, or leave "
        "engine.fp8 at none",
    )
    require(
        precision == "bf16",
        f"{key} needs engine.precision=bf16 (for all but the linear layers' operands), got {precision}",
    )


def check_fp8_shapes(fp8: Fp8, model: ModelConfig, layout: ParallelLayout) -> None:
    """Whether the linear layers' sizes on one rank suit fp8. Raises LayoutError naming the first that does not."""
    if fp8 == "none":
        return
    tensor = layout.tensor
    tokens = layout.micro_batch_size * model.seq_len
    sizes = {
        "model.d_model": model.d_model,
        "model.num_heads x model.d_head / parallel.tensor": model.num_heads * model.head_width // tensor,
        "the width of queries, keys and values / parallel.tensor": (model.num_heads + 2 * model.kv_groups)
        * model.head_width
        // tensor,
        "model.d_ff / parallel.tensor": model.ffn_width // tensor,
        "parallel.micro_batch_size x model.seq_len": tokens,
    }
    if layout.sequence:
        sizes["parallel.micro_batch_size x model.seq_len / parallel.tensor (parallel.sequence)"] = tokens // tensor
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise LayoutError(
                f"engine.fp8={fp8} needs multiples of {MULTIPLE}: {name} is {size}; change it, or use engine.fp8=none"
            )
