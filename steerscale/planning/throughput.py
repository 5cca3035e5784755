"""Seconds per iteration -> tokens, FLOPs and utilisation, every figure with its formula beside it.

Four FLOP rates of one run differ by up to a factor of two, and each has been called "TFLOPs per GPU" somewhere.
`FORMULAS` says which is which; whoever shows a figure shows its formula and the peak it was divided by.
"""

from dataclasses import dataclass

from steerscale.config import require
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.flops import hardware_flops, legacy_flops, model_flops

FORMULAS: dict[str, str] = {
    "samples_per_second": "GBS / seconds",
    "tokens_per_second_per_gpu": "GBS s / (seconds GPUs)",
    "model_tflops_per_gpu": "GBS s 6 (L [h (a+2g) d + a d h + k h f + a d s] + h V) / (seconds GPUs 1e12)",
    "hardware_tflops_per_gpu": (
        "as model_tflops_per_gpu with V padded, and one more forward of the attention (selective) or the blocks (full); "
        "norms and activation functions are never counted (pointwise)"
    ),
    "mfu": "model_tflops_per_gpu / dense bf16 peak",
    "hfu": "hardware_tflops_per_gpu / dense bf16 peak",
    "legacy_tflops_per_gpu": (
        "(24 | 32 gated) (3 | 4 selective, full) GBS s L h^2 (1 + s/6h + V/16Lh) / (seconds GPUs 1e12), V padded"
    ),
}
"""Formula of each field of `Throughput`; symbols as in `steerscale.planning.flops`, GPUs = tensor x pipeline x data."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What one iteration achieved. A "GPU" is one rank, whatever it runs on."""

    samples_per_second: float
    """Sequences of all replicas together."""
    tokens_per_second_per_gpu: float
    """Trained tokens; the figure that compares layouts of one model and depends on no FLOP formula."""
    model_tflops_per_gpu: float
    """Exact model FLOPs, 1e12/s; the figure that compares models."""
    hardware_tflops_per_gpu: float
    """Executed FLOPs, 1e12/s: model FLOPs, vocabulary padding and recomputation."""
    legacy_tflops_per_gpu: float
    """`iteration-time/TFLOPs per gpu (estimated)` as OpenGPT-X's Megatron fork logged it; see `legacy_flops`."""
    peak_tflops: float | None
    """The peak that MFU and HFU are fractions of, 1e12/s; None: unknown device."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None without a peak."""
    hfu: float | None
    """Hardware FLOPs utilisation, 0 to 1; None without a peak."""


def throughput(
    seconds_per_iteration: float,
    *,
    model: ModelConfig,
    layout: ParallelLayout,
    recompute: Recompute,
    peak_tflops: float | None,
) -> Throughput:
    """Account for one iteration of `layout.global_batch_size` sequences on `layout.world_size` ranks.

    Args:
        seconds_per_iteration: wall time from step to step, optimizer included; the caller leaves out warm-up,
            evaluation and checkpoints.
        model: with a known vocabulary.
        layout: gives the batch and the number of ranks.
        recompute: what the backward pass repeats; raises hardware and legacy figures, not the model's.
        peak_tflops: of one device, from `hardware.peak_tflops`; None leaves MFU and HFU unknown.
    """
    require(seconds_per_iteration > 0, f"seconds_per_iteration must be positive, got {seconds_per_iteration}")
    batch_size = layout.global_batch_size
    gpu_seconds = seconds_per_iteration * layout.world_size
    model_tflops = model_flops(model, batch_size=batch_size) / gpu_seconds / 1e12
    hardware_tflops = hardware_flops(model, batch_size=batch_size, recompute=recompute) / gpu_seconds / 1e12
    return Throughput(
        samples_per_second=batch_size / seconds_per_iteration,
        tokens_per_second_per_gpu=batch_size * model.seq_len / gpu_seconds,
        model_tflops_per_gpu=model_tflops,
        hardware_tflops_per_gpu=hardware_tflops,
        legacy_tflops_per_gpu=legacy_flops(model, batch_size=batch_size, recompute=recompute) / gpu_seconds / 1e12,
        peak_tflops=peak_tflops,
        mfu=None if peak_tflops is None else model_tflops / peak_tflops,
        hfu=None if peak_tflops is None else hardware_tflops / peak_tflops,
    )
