"""A trained GPT from a run directory, on the layout of the caller's context."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerscale.checkpoint.store import PREFIX, find_damage, load_state, step_of
from steerscale.config import from_mapping
from steerscale.engines.state import load_weights
from steerscale.errors import CheckpointError, ConfigError
from steerscale.models.gpt import GPT, build_chunks, transformer_config
from steerscale.models.sharding import named_shards
from steerscale.parallel.context import ParallelContext
from steerscale.rundir import read_config
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.registry import load_tokenizer
from steerscale.train.config import RunConfig


@dataclass(frozen=True)
class TrainedGPT:
    """Model chunks of this rank in evaluation mode, and what belongs to them."""

    chunks: list[GPT]
    config: RunConfig
    checkpoint: Path
    tokenizer: Tokenizer

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return step_of(self.checkpoint)


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run, which may still be going on. Raises CheckpointError if there is none."""
    for candidate in sorted((run_dir / "checkpoints").glob(f"{PREFIX}*"), reverse=True):
        if find_damage(candidate, verify=False) is None:
            return candidate
    raise CheckpointError(f"{run_dir} holds no whole checkpoint: train it first, or name another run directory")


def load_gpt(
    run_dir: Path,
    context: ParallelContext,
    *,
    checkpoint: Path | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
) -> TrainedGPT:
    """Build the model of a run on `context` and read its weights, each rank only its own part.

    Args:
        checkpoint: a checkpoint directory; None: the run's newest.
        precision: of parameters and activations; None: the run's.
    """
    config = from_mapping(RunConfig, read_config(run_dir))
    context.layout.check_model(config.model)
    checkpoint = checkpoint or newest_checkpoint(run_dir)
    transformer = transformer_config(config.model, context, precision=precision or config.engine.precision)
    chunks = build_chunks(config.model, transformer, context)
    _, reader = load_state(checkpoint)
    load_weights(list(named_shards(chunks)), context, reader)
    for chunk in chunks:
        chunk.eval()
    return TrainedGPT(chunks=chunks, config=config, checkpoint=checkpoint, tokenizer=_tokenizer(config))


def _tokenizer(config: RunConfig) -> Tokenizer:
    if config.data is None:
        raise ConfigError("the run has no data section, so its tokenizer is unknown")
    dataset = next(iter(config.data.weights))
    return load_tokenizer(Path(dataset) / "tokenizer")
