"""What gpt_gpu.py measures: shapes, batches that fit the device, and the run of each as a configuration."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.data.config import DataConfig
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.fit import usable_gib
from steerscale.planning.memory import estimate_memory
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig

SEED = 0
VOCABULARY = 50304
"""GPT-2's 50,257 tokens, padded to a multiple of 128."""
OPTIM = OptimConfig(lr=1e-4, min_lr=0.0, schedule="constant")
Blocks = Literal["llama", "gpt"]

# Layers, width, heads: configs/model/*.yaml
SHAPES = {"125m": (12, 768, 12), "1.3b": (24, 2048, 16), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32)}
LARGEST = "largest"
SIZES = (*SHAPES, LARGEST)
FEWEST_LAYERS = 8
"""Of the widest shape, or a narrower one is taken as the largest."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and the batch it is trained with."""

    name: str
    model: ModelConfig
    micro_batch_size: int
    micro_batches: int
    steps: int
    """Measured ones."""
    warmup: int

    @property
    def layout(self) -> ParallelLayout:
        """One rank."""
        return ParallelLayout(micro_batch_size=self.micro_batch_size, gradient_accumulation_steps=self.micro_batches)

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.micro_batch_size * self.micro_batches * self.model.seq_len

    @property
    def total_steps(self) -> int:
        """Steps to run: a step ends where the next one begins, so that there is one more."""
        return self.warmup + self.steps + 1

    @property
    def planned_gib(self) -> float:
        """The planner's estimate of the Megatron engine's memory, without the CUDA context and fragmentation."""
        return planned_gib(self.model, self.micro_batch_size)

    def halved(self) -> "Case":
        """The same step in micro-batches of half the size."""
        return replace(self, micro_batch_size=self.micro_batch_size // 2, micro_batches=self.micro_batches * 2)


def shape(name: str, blocks: Blocks, *, seq_len: int, num_layers: int | None = None) -> ModelConfig:
    """A model of one of `SHAPES`: Llama's blocks (MLP of 8/3 d, a multiple of 128), or GPT-3's as in configs/model."""
    layers, width, heads = SHAPES[name]
    common = ModelConfig(
        num_layers=num_layers or layers, d_model=width, num_heads=heads, seq_len=seq_len, vocab_size=VOCABULARY
    )
    if blocks == "gpt":
        return common
    hidden = -(-8 * width // 3 // 128) * 128
    return replace(common, d_ff=hidden, position="rotary", norm="rmsnorm", activation="swiglu", bias=False)


def planned_gib(model: ModelConfig, micro_batch_size: int, *, fused_attention: bool = True) -> float:
    """Memory of one rank in bf16 by the planner."""
    layout = ParallelLayout(micro_batch_size=micro_batch_size)
    engine = EngineConfig(precision="bf16")
    return estimate_memory(model, layout, engine=engine, fused_attention=fused_attention).total_gib


def make_case(
    size: str, blocks: Blocks, *, seq_len: int, device_gib: float, step_tokens: int, most: int, steps: int, warmup: int
) -> Case | None:
    """A size with the largest micro-batch of 1, 2, 4, ... that fits and has at most `most` tokens; None: none does."""
    name, model = (
        largest(blocks, seq_len, device_gib) if size == LARGEST else (size, shape(size, blocks, seq_len=seq_len))
    )
    fitting = [
        rows
        for rows in (2**power for power in range(10))
        if rows * seq_len <= most and planned_gib(model, rows) <= usable_gib(device_gib)
    ]
    if not fitting:
        return None
    rows = fitting[-1]
    return Case(
        name=f"{name} s{seq_len}",
        model=model,
        micro_batch_size=rows,
        micro_batches=max(step_tokens // (rows * seq_len), 1),
        steps=steps,
        warmup=warmup,
    )


def largest(blocks: Blocks, seq_len: int, device_gib: float) -> tuple[str, ModelConfig]:
    """As many layers of the widest shape as fit; where those are too few, of the next."""
    for name in ("6.7b", "2.7b"):
        for layers in range(SHAPES[name][0], FEWEST_LAYERS - 1, -1):
            model = shape(name, blocks, seq_len=seq_len, num_layers=layers)
            if planned_gib(model, 1) <= usable_gib(device_gib):
                return (name if layers == SHAPES[name][0] else f"{name}-width x {layers}"), model
    return "1.3b", shape("1.3b", blocks, seq_len=seq_len)


def tiny_cases() -> Iterator[Case]:
    """What --quick runs."""
    model = shape("125m", "llama", seq_len=64)
    model = replace(model, num_layers=2, d_model=64, num_heads=2, d_ff=128, vocab_size=256)
    yield Case(name="tiny s64", model=model, micro_batch_size=2, micro_batches=2, steps=2, warmup=1)


def run_config(case: Case, data: Path, run_dir: Path, *, compiled: bool) -> RunConfig:
    """Our run of a case, as `python -m launch.train` would start it on one rank."""
    engine = {"compile": "blocks"} if compiled else {}
    return RunConfig(
        name="gpt_gpu",
        run_dir=str(run_dir),
        model=case.model,
        data=DataConfig(path=str(data), random_offset=False),
        train=TrainConfig(steps=case.total_steps, eval_interval=0),
        optim=OPTIM,
        parallel=ParallelConfig(micro_batch_size=case.micro_batch_size, gradient_accumulation_steps=case.micro_batches),
        engine=EngineConfig(precision="bf16", kernels="torch", **engine),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(at_end=False),
        metrics=MetricsConfig(interval=1, tensorboard=False),
        seed=SEED,
    )
