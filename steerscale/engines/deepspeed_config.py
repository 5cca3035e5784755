"""Our settings in DeepSpeed's words: the ds_config of a run. Torch-free.

Batch sizes go by DeepSpeed's names: MBS is `train_micro_batch_size_per_gpu`, GAS `gradient_accumulation_steps`, and
`train_batch_size` the global batch.
"""

import json
from pathlib import Path
from typing import Any

from steerscale.engines.config import EngineConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.states import bucket_elements
from steerscale.rundir import write_text

FILE = "ds_config.json"


def ds_config(
    engine: EngineConfig, optim: OptimConfig, layout: ParallelLayout, *, parameters: int, on_cuda: bool
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given on a rank with so many parameters."""
    zero: dict[str, Any] = {"stage": engine.zero, "overlap_comm": engine.overlap and on_cuda and layout.pipeline == 1}
    if engine.zero:
        # DeepSpeed allocates the bucket whole: one larger than the rank's gradients would be memory for nothing.
        bucket = bucket_elements(parameters)
        zero.update(contiguous_gradients=True, reduce_scatter=on_cuda, reduce_bucket_size=bucket)
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    config: dict[str, Any] = {
        "train_batch_size": layout.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.gradient_accumulation_steps,
        # Without ZeRO, DeepSpeed clips but does not say the norm: `deepspeed_state.ClippedAdamW` does both.
        "gradient_clipping": optim.clip if engine.zero else 0.0,
        "zero_optimization": zero,
        # The optimizer is torch's AdamW, whose fused kernel needs no compiler on any device.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    if engine.precision == "bf16":
        # ZeRO-1 adds each gradient to the fp32 sum as it comes; else the bf16 ones are kept beside it.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # else gradients are reduced in bf16
    if engine.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return config


def write_ds_config(config: dict[str, Any], run_dir: Path) -> None:
    """Leave it in the run directory, for whoever knows DeepSpeed better than us."""
    write_text(run_dir / FILE, json.dumps(config, indent=2) + "\n")
