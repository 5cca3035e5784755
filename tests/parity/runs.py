"""Two small GPTs that between them use every kind of layer, and the run that all layouts have to repeat."""

from dataclasses import replace
from pathlib import Path

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.data.config import DataConfig
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig

STEPS = 20
SEQUENCES = 8
"""In one optimizer step, on every layout."""

LLAMA = ModelConfig(
    num_layers=4,
    d_model=64,
    num_heads=4,
    num_kv_groups=2,
    d_ff=160,
    seq_len=64,
    vocab_size=1000,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=True,
    init_std=0.08,
)
GPT2 = ModelConfig(
    num_layers=4,
    d_model=64,
    num_heads=4,
    seq_len=64,
    vocab_size=1000,
    activation="gelu_tanh",
    tie_embeddings=False,
    init_std=0.08,
)
MODELS = {"llama": LLAMA, "gpt2": GPT2}
OPTIM = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=8, clip=1.0, eps=1e-6)
"""Some gradients are clipped, some are not.

With this and init_std=0.08 the path is smooth: float32 stays within 1e-6 of float64 in plain PyTorch. With init_std=0.02
gradient norms jump, and there float32 is up to 5e-5 away from float64 whatever computes it: nothing could be told."""


def run_config(
    data: Path,
    run_dir: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    engine: EngineConfig | None = None,
    documents: bool = False,
    steps: int = STEPS,
) -> RunConfig:
    """A run over German text, with the same samples in every step whatever the layout.

    `documents` keeps attention and positions within documents and leaves their first tokens out of the loss.
    """
    return RunConfig(
        name="parity",
        run_dir=str(run_dir),
        model=model,
        data=DataConfig(path=str(data), reset_at_document_end=documents, mask_document_end=documents),
        train=TrainConfig(steps=steps, eval_interval=0, eval_samples=11),
        parallel=parallel,
        engine=engine or EngineConfig(),
        optim=replace(OPTIM, warmup_steps=min(OPTIM.warmup_steps, steps // 2)),
        checkpoint=CheckpointConfig(),
        metrics=MetricsConfig(interval=1, tensorboard=False),
    )


def layout(**degrees: int | bool) -> ParallelConfig:
    """Degrees with the global batch of every parity run."""
    return ParallelConfig(global_batch_size=SEQUENCES, **{"micro_batch_size": 2, **degrees})  # type: ignore[arg-type]
