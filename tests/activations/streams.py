"""Small streams for tests that run on ranks."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steerscale.activations.config import StreamConfig
from steerscale.activations.facts import buffer_dtype
from steerscale.activations.order import GIB
from steerscale.activations.placement import PRODUCERS, TRAINERS, Placement
from steerscale.activations.producer import Producer
from steerscale.activations.remote import RemoteSource
from steerscale.activations.source import GPTSource
from steerscale.activations.stream import ActivationStream
from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.models.config import ModelConfig
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.link import Link
from steerscale.parallel.worlds import World, join_world
from tests.models.gpts import GPT2, LLAMA, build_random

SEQ_LEN, LANES, BLOCK = 32, 8, 5
VOCABULARY = 1000
EOS = 2  # of the German test data's tokenizer
# A width that two ranks cannot halve.
MODELS = {
    "gpt2": replace(GPT2, vocab_size=VOCABULARY, seq_len=SEQ_LEN),
    "llama": replace(LLAMA, vocab_size=VOCABULARY, seq_len=SEQ_LEN, d_model=25),
}
EARLY, LATE = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"
ONE = ParallelLayout()


def stream_config(model: ModelConfig, *, hooks: int = 1, **changes: Any) -> StreamConfig:
    """Blocks of BLOCK sequences of each of LANES lanes, two or three in a forward pass."""
    sequence = model.d_model * 4 * (SEQ_LEN - changes.get("drop_first", 0))
    size = 2 * LANES * BLOCK * sequence * hooks / GIB
    config = StreamConfig(lm="tests build it", lanes=LANES, micro_batch_size=2, buffer_gib=size * 1.01)
    return replace(config, **changes)


def dataset(data: Path, seed: int = 0) -> SampleStream:
    """The German test data in sequences of SEQ_LEN."""
    return SampleStream(DataConfig(path=str(data)), seq_len=SEQ_LEN, seed=seed)


def build(
    data: Path, model: ModelConfig, hooks: Sequence[str], context: ParallelContext, seed: int = 0, **changes: Any
) -> ActivationStream:
    """A stream of a random model's activations; `changes` are StreamConfig's."""
    source = GPTSource(build_random(model, context), hooks, context, seq_len=SEQ_LEN)
    config = stream_config(model, hooks=len(hooks), **changes)
    return ActivationStream(config, source, dataset(data), context, seed)


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    place: tuple[int, int, int]
    """Pipeline, data, tensor."""
    ids: list[np.ndarray]
    """Of each step."""
    activations: dict[str, list[np.ndarray]]
    """By hook, of each step."""
    consumed: int
    """The stream's hash."""
    state: dict[str, Any]
    """After the last step."""


def take(
    stream: ActivationStream, context: ParallelContext, sizes: Iterable[int], state: dict[str, Any] | None = None
) -> Seen:
    """Steps of these global batch sizes, from `state` on."""
    if state is not None:
        stream.load(state)
    ids, activations = [], {hook: [] for hook in stream.source.owned}
    for size in sizes:
        batch = stream.next(size // context.layout.data)
        ids.append(batch.ids.numpy())
        assert batch.activations.keys() == activations.keys()
        for hook, x_Bd in batch.activations.items():
            activations[hook].append(x_Bd.float().numpy())  # numpy has no bfloat16
    return Seen(tuple(context.at), ids, activations, stream.consumed.value, stream.state())


def see(
    layout: ParallelLayout,
    data: Path,
    model: ModelConfig,
    hooks: Sequence[str],
    sizes: Sequence[int],
    state: dict[str, Any] | None = None,
) -> Seen:
    """Build and take, on the ranks of the current process group. For `RankPool.run`."""
    with initialize(layout) as context, closing(build(data, model, hooks, context)) as stream:
        return take(stream, context, sizes, state)


@contextmanager
def joined(sizes: Mapping[str, int]) -> Iterator[World]:
    """The pool's ranks as several worlds, for a while."""
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    store.add("joined", 1)
    while store.add("joined", 0) < size:  # who leaves while another is still connecting cuts it off
        time.sleep(0.002)
    dist.destroy_process_group()
    try:
        with join_world(sizes, started=(store, rank, size)) as world:
            yield world
    finally:
        dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=size)


def see_apart(
    placement: Placement,
    data: Path,
    model: ModelConfig,
    hooks: Sequence[str],
    sizes: Sequence[int],
    state: dict[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Seen | list[bytes]:
    """As `see`, with the model on ranks of its own; of those, the tokens of each forward pass. For `RankPool.run`."""
    config = stream_config(model, hooks=len(hooks), **(changes or {}))
    layouts = {TRAINERS: placement.trainers, PRODUCERS: placement.producers}
    with (
        joined({name: layout.world_size for name, layout in layouts.items()}) as world,
        initialize(layouts[world.name], world=world) as context,
    ):
        link = Link(world, device=context.device)
        if world.name == PRODUCERS:
            source = RecordingSource(GPTSource(build_random(model, context), hooks, context, seq_len=SEQ_LEN))
            dtype = buffer_dtype(config, source)
            Producer(source, link, placement, context, store=world.everyone, dtype=dtype).serve(lambda: None)
            return source.passes
        remote = RemoteSource(link, placement, context, world.everyone)
        with closing(ActivationStream(config, remote, dataset(data), context)) as stream:
            seen = take(stream, context, sizes, state)
            stream.load(seen.state)  # waits for all that was asked for: what is still to come at a close is not run
            return seen


class RecordingSource:
    """Keeps the tokens of each forward pass of a source."""

    def __init__(self, source: Any) -> None:
        self._source, self.passes = source, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The source's own."""
        for tokens_BS in batches:
            self.passes.append(tokens_BS.numpy().tobytes())
            yield from self._source.run([tokens_BS])
