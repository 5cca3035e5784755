"""SAEs trained on the ranks of a pool: a tiny frozen model, what was selected at every step, and where it ended."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steerscale.activations.config import StreamConfig
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.data.config import DataConfig
from steerscale.metrics import read_records
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.parallel.select import Selection
from steerscale.rundir import create_run_dir
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import SAEConfig
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig
from steerscale.train.run import run
from steerscale.train.signals import StopRequest
from tests.train.runs import newest, whole_tensors

MODEL = ModelConfig(num_layers=4, d_model=32, num_heads=4, seq_len=32, vocab_size=1000)
HOOK = "blocks.1.hook_resid_post"
STEPS = 30
EVAL_SAMPLES = 8
"""Of the evaluation at the end, where no test asks for another: on four ranks the whole split takes longer than training."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": 0.02},
    "gated": {"sparsity": 0.02},
    "topk": {"dead_after": 64, "aux_k": 8},
    "batch_topk": {"dead_after": 64, "aux_k": 8},
    "jumprelu": {"sparsity": 0.005, "bandwidth": 0.05, "initial_threshold": 0.05, "sparsity_warmup_steps": 10},
    "matryoshka": {"prefixes": [0.2, 0.5, 1.0], "dead_after": 64, "aux_k": 8},
}
"""Settings under which 30 steps come by everything: latents die and are used by AuxK, thresholds move, penalties bite."""


def language_model(data: Path, run_dir: Path) -> Path:
    """A run directory with a barely trained model."""
    config = RunConfig(
        name="lm",
        run_dir=str(run_dir),
        model=MODEL,
        data=DataConfig(path=str(data)),
        train=TrainConfig(steps=3, eval_samples=EVAL_SAMPLES),
        parallel=ParallelConfig(micro_batch_size=8),
        optim=OptimConfig(lr=3e-3, min_lr=3e-3, schedule="constant"),
        metrics=MetricsConfig(tensorboard=False),
    )
    create_run_dir(run_dir, config, command=["test"])
    return run_dir


def sae_config(
    lm: Path,
    data: Path,
    run_dir: Path,
    *,
    parallel: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
    **sae: Any,
) -> RunConfig:
    """30 steps of 64 vectors; `sections` replace those of the configuration, `sae` is what its section is to have."""
    layout = {"global_batch_size": 64, **(parallel or {})}
    layout.setdefault("micro_batch_size", 64 // layout.get("data", 1))
    config = RunConfig(
        name="sae",
        run_dir=str(run_dir),
        model=MODEL,
        data=DataConfig(path=str(data)),
        sae=SAEConfig(**{"hooks": [HOOK], "width": 128, "k": 4, **sae}),
        stream=StreamConfig(lm=str(lm), lanes=4, buffer_gib=4e-4, micro_batch_size=4),
        train=TrainConfig(steps=STEPS, eval_samples=EVAL_SAMPLES),
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=3, weight_decay=0.0, beta2=0.999, eps=1e-6),
        parallel=ParallelConfig(**layout),
        checkpoint=CheckpointConfig(interval=10, keep=0),
        metrics=MetricsConfig(interval=1, warmup_steps=0, tensorboard=False),
    )
    return replace(config, **(sections or {}))


@dataclass(frozen=True)
class Trained:
    """What a run did."""

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    active: dict[str, list[set[tuple[int, int]]]]
    """By SAE, at each forward pass the active (vector of the replicas' micro-batches, latent)."""
    tensors: dict[tuple[str, str], np.ndarray]
    """Whole tensors at the end by kind and name."""
    consumed_hash: str


Active = dict[str, list[tuple[np.ndarray, np.ndarray]]]
"""By SAE, at each forward pass: vectors and latents of the active entries."""


def train_sae(config: RunConfig) -> Active:
    """Train on the ranks of the current process group; this rank's active entries. For `RankPool.run`."""
    active: Active = {}
    note = SparseAutoencoder.note_active

    def remember(sae: SparseAutoencoder, selection: Selection, values: torch.Tensor) -> None:
        kept = values.detach() > 0
        first = sae.context.at.data * selection.num_tokens
        rows, latents = selection.tokens[kept] + first, selection.latents[kept] + sae.first_latent
        active.setdefault(sae.spec.name, []).append((rows.numpy(), latents.numpy()))
        note(sae, selection, values)

    SparseAutoencoder.note_active = remember  # type: ignore[method-assign]
    try:
        run(Path(config.run_dir), rank=dist.get_rank(), stop=StopRequest(), threads=1)
    finally:
        SparseAutoencoder.note_active = note  # type: ignore[method-assign]
    return active


def trained(pool: Any, config: RunConfig) -> Trained:
    """Train on as many ranks as the layout has, and read what came of it."""
    run_dir = Path(config.run_dir)
    create_run_dir(run_dir, config, command=["test"])
    parts: list[Active] = pool.run(train_sae, config, ranks=config.layout().world_size)
    names = sorted({name for part in parts for name in part})
    records = read_records(run_dir, "train")
    return Trained(
        losses=[record["loss"] for record in records],
        grad_norms=[record["grad_norm"] for record in records],
        metrics=[record["metrics"] for record in records],
        active={
            name: [
                {(int(row), int(latent)) for rows, latents in step for row, latent in zip(rows, latents)}
                for step in zip(*(part[name] for part in parts if name in part), strict=True)
            ]
            for name in names
        },
        tensors={key: tensor.numpy() for key, tensor in whole_tensors(newest(run_dir)).items()},
        consumed_hash=records[-1]["consumed_hash"],
    )
