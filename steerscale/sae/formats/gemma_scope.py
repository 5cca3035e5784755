"""Gemma Scope: JumpReLU SAEs in params.npz (w_enc [d_in, n], w_dec [n, d_out], b_enc, b_dec, threshold), float32.

There is no configuration; hook and model are known from the path of a published file at most. The published archives are
compressed: a range of latents is cut out while a tensor is read through, so memory holds the range and a few MiB.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from steerscale.errors import CheckpointError
from steerscale.sae.formats.base import Format, LatentReader, Tensors, cannot_hold
from steerscale.sae.weights import SAEWeights

PARAMS = "params.npz"

_BLOCK_BYTES = 4 * 2**20
_PUBLISHED = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b.*/layer_(\d+)(/|$)")
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read(directory: Path, latents: slice | None) -> SAEWeights:
    """Read an SAE; see `Format.read`."""
    with _open_npz(directory / PARAMS) as file:
        return read_jumprelu(LatentReader(file, latents, name="w_enc", axis=1), **_published(directory))


def read_jumprelu(reader: LatentReader, **fields: Any) -> SAEWeights:
    """The JumpReLU SAE in Gemma Scope's tensors, with further fields of SAEWeights."""
    return SAEWeights(
        architecture="jumprelu",
        W_enc=reader.latents("w_enc", 1),
        W_dec=reader.latents("w_dec"),
        b_enc=reader.latents("b_enc"),
        b_dec=reader.whole("b_dec"),
        threshold=reader.latents("threshold"),
        subtract_b_dec=False,
        **fields,
        **reader.position,
    )


def write(weights: SAEWeights, directory: Path) -> None:
    """Write an SAE; see `Format.write`."""
    if weights.W_skip is not None:
        raise cannot_hold("gemma_scope", weights, "it has no skip path; gemma_scope_2 has")
    tensors = jumprelu_tensors(weights, "gemma_scope")
    with zipfile.ZipFile(directory / PARAMS, "w") as archive:
        for name, tensor in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, tensor.detach().float().cpu().numpy(), allow_pickle=False)


def jumprelu_tensors(weights: SAEWeights, name: str) -> dict[str, torch.Tensor]:
    """Gemma Scope's tensors, b_dec folded into b_enc. Raises ConfigError if the SAE is no JumpReLU SAE."""
    weights = weights.fold_b_dec()
    threshold = weights.threshold
    if weights.architecture == "relu" and weights.b_enc is not None:
        threshold = torch.zeros_like(weights.b_enc)  # z > 0, which is what ReLU is
    if threshold is None or weights.b_enc is None:
        raise cannot_hold(name, weights, "it is for JumpReLU")
    return {
        "w_enc": weights.W_enc,
        "w_dec": weights.W_dec,
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
        "threshold": threshold,
    }


def _published(directory: Path) -> dict[str, str]:
    found = _PUBLISHED.search(directory.absolute().as_posix())
    if found is None:
        return {}
    size, variant, site, layer, _ = found.groups()
    return {
        "model": f"gemma-2-{size}{'-it' if variant == 'it' else ''}",
        "hook": f"blocks.{layer}.{_SITES[site]}",
    }


class _Npz:
    """Arrays in a zip archive, plain numbers only: a pickled array is refused, not loaded."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self.names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}

    def shape(self, name: str) -> tuple[int, ...]:
        with self._archive.open(f"{name}.npy") as file:
            return self._header(name, file)[0]

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        with self._archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = self._header(name, file)
            if not fortran:
                return torch.from_numpy(_read_rows(file, shape, dtype, axis, start, stop))
            # Stored the other way round: the transpose is in rows.
            transposed = _read_rows(file, shape[::-1], dtype, len(shape) - 1 - axis, start, stop)
            return torch.from_numpy(transposed.T.copy())

    def _header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise CheckpointError(f"{self.path}: {name} is of npy version {version}, expected 1 or 2")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.kind != "f":
            raise CheckpointError(
                f"{self.path}: {name} is of type {dtype}, expected a float type (nothing is unpickled)"
            )
        return shape, fortran, dtype


def _read_rows(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, axis: int, start: int, stop: int
) -> np.ndarray[Any, Any]:
    """Indices [start, stop) of an axis of a row-major array, in float32, block by block. Raises ValueError if cut off."""
    rows, width = (*shape, 1)[0], shape[1:]
    row_bytes = dtype.itemsize * prod(width)
    first, last = (start, stop) if axis == 0 else (0, rows)
    file.seek(first * row_bytes, 1)
    columns = slice(None) if axis == 0 else (slice(None),) * axis + (slice(start, stop),)
    block = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    blocks = []
    for row in range(first, last, block):
        count = min(block, last - row)
        data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise ValueError("an array is cut off")
        blocks.append(np.frombuffer(data, dtype).reshape(count, *width)[columns].astype(np.float32))
    return np.concatenate(blocks)


@contextmanager
def _open_npz(path: Path) -> Iterator[Tensors]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield _Npz(path, archive)
    # RuntimeError: zipfile's for what is encrypted, or compressed in a way that it does not know.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


GEMMA_SCOPE = Format(files=(PARAMS,), read=read, write=write)
