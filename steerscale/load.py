"""Trained models from run directories, on the layout of the caller's context: a GPT, or SAEs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerscale.checkpoint.integrity import newest_checkpoint
from steerscale.checkpoint.store import load_state, step_of
from steerscale.config import from_mapping
from steerscale.engines.state import load_weights
from steerscale.errors import ConfigError
from steerscale.models.gpt import GPT, build_chunks, transformer_config
from steerscale.models.sharding import named_shards
from steerscale.parallel.context import ParallelContext
from steerscale.rundir import read_config
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import specs_of
from steerscale.sae.state import load_state as load_sae_state
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


def run_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer of a run's data. Raises ConfigError if the run has none."""
    return _tokenizer(from_mapping(RunConfig, read_config(run_dir)))


def _tokenizer(config: RunConfig) -> Tokenizer:
    if config.data is None:
        raise ConfigError("the run has no data section, so its tokenizer is unknown")
    dataset = next(iter(config.data.weights))
    return load_tokenizer(Path(dataset) / "tokenizer")


def load_saes(
    run_dir: Path, widths: Mapping[str, int], context: ParallelContext, *, checkpoint: Path | None = None
) -> list[SparseAutoencoder]:
    """The SAEs of a run in evaluation mode, each rank only its own latents; moving averages where the run kept them.

    Args:
        widths: of the activations by hook point, from the source they are read from.
        context: a world without pipeline.
        checkpoint: a checkpoint directory; None: the run's newest.
    Raises:
        ConfigError: the run trains no SAEs.
    """
    config = from_mapping(RunConfig, read_config(run_dir))
    if config.sae is None:
        raise ConfigError(f"{run_dir} is no run of SAEs: it has no sae section")
    checkpoint = checkpoint or newest_checkpoint(run_dir)
    _, reader = load_state(checkpoint)
    saes = []
    for spec in specs_of(config.sae, dict(widths)):
        sae = ARCHITECTURES[spec.config.architecture](spec, context)
        load_weights(list(sae.shards()), context, reader)
        load_sae_state(sae, reader)
        for name, average in sae.averages.items():
            sae.get_parameter(name).data.copy_(average)
        saes.append(sae.eval())
    return saes
