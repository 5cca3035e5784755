"""SAEs that were trained here, from the checkpoint of a run: as `SAEWeights`, for export, evaluation and steering."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerscale.checkpoint.fragments import FragmentReader
from steerscale.checkpoint.store import load_state
from steerscale.errors import CheckpointError, ConfigError
from steerscale.sae.weights import SAEWeights

_AT_INFERENCE = ("batch_topk", "matryoshka")
"""Architectures whose threshold is one running mean, kept in the state."""


def trained_names(checkpoint: Path) -> list[str]:
    """Names of the SAEs in a checkpoint. Raises CheckpointError if it is of another kind of run."""
    return list(_specs(checkpoint, load_state(checkpoint)[0]))


def read_trained(
    checkpoint: Path, name: str | None = None, *, latents: slice | None = None, model: str | None = None
) -> SAEWeights:
    """Read an SAE, or a range of its latents, in float32 on the CPU; its moving average if the run kept one.

    Args:
        name: as in `trained_names`; None: the only one.
        latents: without a step; no more is read than the checkpoint's pieces that overlap it.
        model: the language model's name, to be kept with it.
    Raises:
        CheckpointError: the checkpoint cannot be read or holds no SAEs.
        ConfigError: it holds none of that name, or not those latents.
    """
    state, reader = load_state(checkpoint)
    specs = _specs(checkpoint, state)
    if name is None and len(specs) == 1:
        (name,) = specs
    if name not in specs:
        asked = "several SAEs: name one of" if name is None else f"no SAE {name!r}, only"
        raise ConfigError(f"{checkpoint} holds {asked} {', '.join(specs)}")
    spec = specs[name]
    width, config = spec["width"], spec["config"]
    start, stop, step = (latents or slice(None)).indices(width)
    if step != 1 or start >= stop or (latents is not None and (latents.stop or 0) > width):
        raise ConfigError(f"{name} has latents 0 to {width}: {latents} is no range of them")
    averaged = ("average", f"{name}.b_dec") in reader.names  # there is none before the first update
    pieces = _Pieces(reader, name, "average" if averaged else "weight", start, stop)
    architecture = config["architecture"]
    bias = "b_gate" if architecture == "gated" else "b_enc"
    tensors: dict[str, Any] = {
        "W_enc": pieces.latents("W_enc").T,
        "W_dec": pieces.latents("W_dec"),
        "b_dec": pieces.whole("b_dec"),
        bias: pieces.latents("b_enc"),
    }
    if architecture == "gated":
        tensors |= {part: pieces.latents(part) for part in ("r_mag", "b_mag")}
    elif architecture == "jumprelu":
        tensors["threshold"] = pieces.latents("threshold")
    elif architecture in _AT_INFERENCE:
        tensors["threshold"] = pieces.number("batch_threshold").clamp_min(0).expand(stop - start)
    inputs, outputs = list(spec["inputs"]), list(spec["outputs"])
    return SAEWeights(
        architecture=architecture,
        **tensors,
        k=config["k"] if architecture in ("topk", *_AT_INFERENCE) else None,
        subtract_b_dec=config["subtract_b_dec"] and inputs == outputs,
        input_scale=float(pieces.number("input_scale")),
        output_scale=float(pieces.number("output_scale")),
        hook="+".join(inputs),
        hook_out=None if inputs == outputs else "+".join(outputs),
        model=model,
        first_latent=start,
        total_latents=None if stop - start == width else width,
    )


def _specs(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    specs = state.get("sae")
    if not isinstance(specs, dict) or not specs:
        raise CheckpointError(f"{checkpoint} holds no SAEs: it is of another kind of run")
    return specs


class _Pieces:
    """Tensors of one SAE by their short names."""

    def __init__(self, reader: FragmentReader, name: str, kind: str, start: int, stop: int) -> None:
        self._reader, self._name, self._kind = reader, name, kind
        self._start, self._stop = start, stop

    def latents(self, part: str) -> torch.Tensor:
        """Rows [start, stop)."""
        row = self._shape(part)[1:]
        return self._read(self._kind, part, (self._start, *(0 for _ in row)), (self._stop - self._start, *row))

    def whole(self, part: str) -> torch.Tensor:
        """All of a tensor that is not cut."""
        shape = self._shape(part)
        return self._read(self._kind, part, (0,) * len(shape), shape)

    def number(self, part: str) -> torch.Tensor:
        """A scalar of the state beside the weights."""
        return self._read("state", part, (), ())

    def _shape(self, part: str) -> tuple[int, ...]:
        return self._reader.shapes.get(f"{self._name}.{part}", (0,))  # reading what is not there says so

    def _read(self, kind: str, part: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return self._reader.read(kind, f"{self._name}.{part}", offset=offset, shape=shape).view(shape)
