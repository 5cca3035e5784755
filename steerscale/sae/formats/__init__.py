"""Public formats of sparse autoencoders: one file each, nothing pickled anywhere. docs/sae_formats.md has a table.

To add one: a file like `saelens.py`, and a line in FORMATS.
"""

from pathlib import Path

from steerscale.errors import CheckpointError, ConfigError
from steerscale.sae.formats.base import Format
from steerscale.sae.formats.gemma_scope import GEMMA_SCOPE
from steerscale.sae.formats.gemma_scope_2 import GEMMA_SCOPE_2
from steerscale.sae.formats.llama_scope import LLAMA_SCOPE
from steerscale.sae.formats.saelens import SAELENS
from steerscale.sae.formats.sparsify import SPARSIFY
from steerscale.sae.weights import SAEWeights
from steerscale.tokenizers.directory import new_directory

FORMATS: dict[str, Format] = {
    "saelens": SAELENS,
    "sparsify": SPARSIFY,
    "gemma_scope": GEMMA_SCOPE,
    "gemma_scope_2": GEMMA_SCOPE_2,
    "llama_scope": LLAMA_SCOPE,
}
"""By name."""


def detect_format(directory: Path) -> str:
    """The format of a directory, by its files. Raises CheckpointError if none or several could be meant."""
    names = [name for name, format in FORMATS.items() if format.matches(directory)]
    if len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(f"{directory} could be {' or '.join(names)}: say which with format=")
    known = "; ".join(f"{name}: {' and '.join(format.files)}" for name, format in FORMATS.items())
    raise CheckpointError(f"{directory} holds no SAE in a known format ({known})")


def read_sae(path: Path, format: str | None = None, *, latents: slice | None = None) -> SAEWeights:
    """Read an SAE, or a range of its latents, in float32 on the CPU.

    Args:
        path: its directory, or a file of it.
        format: a name in FORMATS; None to go by the files.
        latents: without a step; nothing else of the per-latent tensors is read from safetensors, or kept from npz.
    Raises:
        CheckpointError: not there, damaged, or of a kind that is not understood.
        ConfigError: `format` is unknown or `latents` are not there.
    """
    if path.is_file():
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: expected the directory of an SAE")
    return _format(detect_format(path) if format is None else format).read(path, latents)


def write_sae(weights: SAEWeights, path: Path, format: str = "saelens") -> None:
    """Write a whole SAE in float32, scales folded, as a directory that appears complete or not at all.

    Raises ConfigError if it is not whole or the format cannot hold it, DataError if `path` exists.
    """
    if not weights.is_whole:
        raise ConfigError(
            f"these are {weights.num_latents} latents of {weights.total_latents}: only a whole SAE is written"
        )
    with new_directory(path) as temporary:
        _format(format).write(weights.fold_scale(), temporary)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"SAE format {name!r} is unknown: one of {', '.join(FORMATS)}")
    return FORMATS[name]
