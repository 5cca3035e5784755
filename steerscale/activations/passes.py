"""Forward passes of the language model and the way of what they give into the buffer, on the ranks that train.

Shapes: B sequences, S sequence, d width of a hook's activation.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from steerscale.activations.buffer import ShuffleBuffer
from steerscale.activations.source import ActivationSource

Arrival = Callable[[], None]
"""Waits until the vectors of a pass may be read."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass, and where what it gives belongs."""

    lane: int
    """Over all replicas."""
    tokens_BS: np.ndarray
    """Int64."""
    kept: np.ndarray
    """Places of the tokens whose vectors are kept, in the flattened pass, rising: int64."""
    row: int
    """Storage row of the first of them."""


class Passes(Protocol):
    """Who runs the model."""

    ahead: bool
    """Whether passes are to begin as soon as there is room for them, as they cost this rank nothing."""

    def begin(self, one: Pass) -> Arrival | None:
        """Begin a pass; None: it is done."""
        ...

    def keep_up(self, left: int) -> None:
        """Wait until no more than `left` of the passes that were begun are still to come."""
        ...


class Stopwatch:
    """Time of this process by what it was spent on."""

    def __init__(self) -> None:
        self.seconds = {"data": 0.0, "lm": 0.0, "shuffle": 0.0}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Time what is done in this context."""
        begin = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begin


class LocalPasses:
    """The model on the same ranks: a pass is run when it is begun, on CUDA on a stream of its own if it may overlap."""

    ahead = False

    def __init__(
        self,
        source: ActivationSource,
        buffer: ShuffleBuffer,
        *,
        device: torch.device,
        overlap: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self._source, self._buffer, self._device, self._time = source, buffer, device, stopwatch
        self._on_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if overlap and self._on_cuda else None

    def begin(self, one: Pass) -> Arrival | None:
        """See `Passes.begin`."""
        with self._beside():
            with self._time("lm"):
                tokens_BS = torch.from_numpy(one.tokens_BS).to(self._device)
                (activations,) = self._source.run([tokens_BS])
            with self._time("shuffle"):
                chosen = torch.from_numpy(one.kept).to(self._device)
                for hook, x_BSd in activations.items():
                    self._buffer.write(hook, one.row, x_BSd.flatten(0, 1), chosen)
            if not self._on_cuda:
                return None
            written: Any = torch.cuda.current_stream().record_event()
            return partial(self._buffer.wait, written)

    def keep_up(self, left: int) -> None:
        """Nothing is still to come."""

    def _beside(self) -> AbstractContextManager:
        """Where forward passes run: on CUDA on a stream of their own, behind the reads that they may write over."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)
