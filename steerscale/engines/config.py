"""Settings that an engine needs beside the layout and the model. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from steerscale.accelerators import Kernels
from steerscale.config import require
from steerscale.engines.fp8 import Fp8, check_fp8
from steerscale.errors import LayoutError
from steerscale.models.config import Recompute
from steerscale.parallel.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How forward, backward and the optimizer step are carried out."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """The engine: Megatron-Core, or DeepSpeed (docs/engines.md)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Parameters and activations; bf16 and fp16 keep fp32 main weights, fp16 (DeepSpeed only) scales the loss. Gradients are
    reduced and accumulated in fp32, but for DeepSpeed's fp16."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: none; pointwise: norms and activation functions, a third of
    what a layer keeps for hardly any time; selective: the core attention, which saves memory only where its kernel stores
    scores (ours and fused ones do not); full: every block."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel replicas (ZeRO-1)."""
    overlap: bool = True
    """On CUDA, overlap gradient reduction and parameter gathering with computation."""
    zero_stage: int | None = None
    """DeepSpeed's ZeRO stage, 0 to 3: what is sharded over the replicas is nothing, optimizer state, gradients too, parameters
    too; null: 1 with distributed_optimizer, else 0."""
    compile: Literal["none", "blocks"] = "none"
    """torch.compile: none, or blocks: each transformer layer becomes one graph, whose pointwise operations are fused. The
    first step takes up to a minute longer; on a CPU a C++ compiler is needed (docs/kernels.md)."""
    kernels: Kernels = "auto"
    """Whose fused kernels AdamW, norms, linear layers, attention and gated activation take on CUDA: torch's, NVIDIA Apex's,
    Transformer Engine's (te) or Liger's, where they have one; auto: by component, the best that is installed. On the CPU:
    torch's, under auto in fp32 with norms, attention and gated activation of our own (docs/kernels.md)."""
    fp8: Fp8 = "none"
    """8-bit operands in the blocks' linear layers, by Transformer Engine: hybrid (e4m3 forward, e5m2 gradients) or e4m3. Needs
    a GPU with FP8 units (H100, RTX 4090 and later), precision=bf16 and shapes that are multiples of 16."""
    offload_optimizer: bool = False
    """DeepSpeed: keep optimizer state and main weights in the host's memory and update them there; needs ZeRO-1 to 3."""

    def __post_init__(self) -> None:
        if self.name == "megatron":
            for key, value, unset in (
                ("zero_stage", self.zero_stage, None),
                ("offload_optimizer", self.offload_optimizer, False),
            ):
                require(
                    value == unset,
                    f"engine.{key}={value} is a setting of DeepSpeed: choose engine=deepspeed, or leave it at its default; "
                    "engine.distributed_optimizer is what Megatron-Core has of ZeRO",
                )
            require(
                self.precision != "fp16",
                "engine.precision=fp16 needs engine=deepspeed, which scales the loss; with engine=megatron use bf16 or fp32",
            )
        else:
            require(
                self.kernels in ("auto", "torch"),
                f"engine.kernels={self.kernels} is for the Megatron engine: DeepSpeed steps with torch's AdamW and its layers "
                "run on torch's kernels; leave it out",
            )
            self._check_zero()
        check_fp8(self.fp8, engine=self.name, precision=self.precision, kernels=self.kernels)

    def _check_zero(self) -> None:
        stage = self.zero_stage
        require(
            stage != 3 or self.compile == "none",
            "engine.compile=blocks with engine.zero_stage=3: hooks gather parameters inside of what would be one graph; use "
            "engine.compile=none, or stage 0, 1 or 2",
        )
        require(stage is None or 0 <= stage <= 3, f"engine.zero_stage must be 0, 1, 2 or 3, got {stage}")
        require(
            self.distributed_optimizer or not stage,
            f"engine.zero_stage={stage} shards the optimizer state and engine.distributed_optimizer=false does not: give one",
        )
        if self.zero != 0:
            return
        require(
            self.precision == "fp32",
            f"engine.precision={self.precision} with ZeRO-0 is nothing DeepSpeed can accumulate in fp32: use "
            "engine.zero_stage=1 (with one replica the same arithmetic), or engine.precision=fp32",
        )
        require(
            not self.offload_optimizer,
            "engine.offload_optimizer=true needs ZeRO: set engine.zero_stage=1, 2 or 3",
        )

    @property
    def zero(self) -> int:
        """ZeRO stage."""
        return self.zero_stage if self.zero_stage is not None else int(self.distributed_optimizer)

    @property
    def title(self) -> str:
        """The engine's name for people."""
        if self.name == "megatron":
            return "Megatron-Core"
        return f"DeepSpeed ZeRO-{self.zero}{' with offload' if self.offload_optimizer else ''}"


def check_engine(engine: EngineConfig, layout: ParallelLayout, *, sae: bool = False) -> None:
    """Whether the engine can run this layout. Raises LayoutError naming both and the way out."""
    if engine.name != "deepspeed":
        return
    if layout.virtual_pipeline > 1:
        raise LayoutError(
            f"parallel.virtual_pipeline={layout.virtual_pipeline}: DeepSpeed's pipeline is plain 1F1B; set it to 1, or use "
            "engine=megatron"
        )
    if layout.pipeline > 1 and engine.zero >= 2:
        raise LayoutError(
            f"engine.zero_stage={engine.zero} with parallel.pipeline={layout.pipeline}: DeepSpeed's pipeline needs whole "
            "gradients until the last micro-batch; use engine.zero_stage=1 or 0, or parallel.pipeline=1"
        )
    if layout.pipeline > 1 and engine.offload_optimizer:
        raise LayoutError(
            f"engine.offload_optimizer=true with parallel.pipeline={layout.pipeline} is not supported: use "
            "parallel.pipeline=1, or leave the optimizer on the device"
        )
    if layout.sequence:
        raise LayoutError(
            "parallel.sequence=true: DeepSpeed does not reduce the gradients of the norms over the tensor group; set it to "
            "false, or use engine=megatron"
        )
    if sae and layout.pipeline > 1:
        raise LayoutError(
            f"parallel.pipeline={layout.pipeline}: SAEs train under DeepSpeed without a pipeline only (each stage would have "
            "to be a world of its own); use parallel.pipeline=1, or engine=megatron"
        )
    if sae and engine.precision == "fp16":
        raise LayoutError("engine.precision=fp16: SAEs train in fp32, or with engine.precision=bf16 for their products")
    if sae and engine.zero == 3:
        raise LayoutError(
            "engine.zero_stage=3: an SAE's decoder is normalised between the steps, which needs whole parameters; use "
            "engine.zero_stage=0, 1 or 2"
        )
