"""One rank of an SAE run whose language model has ranks of its own: a trainer's, or a producer's.

Each kind is a world with its own layout and process groups; between them there is a link (`docs/streaming.md`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from steerscale.activations.facts import buffer_dtype
from steerscale.activations.placement import PRODUCERS, TRAINERS
from steerscale.activations.producer import Producer
from steerscale.activations.remote import RemoteSource
from steerscale.activations.source import ActivationSource
from steerscale.activations.stream import build_source
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.link import Link
from steerscale.parallel.worlds import World, join_world
from steerscale.train.config import RunConfig
from steerscale.train.signals import StopRequest


def run_apart(
    config: RunConfig,
    stop: StopRequest,
    *,
    train: Callable[[ParallelContext, ActivationSource], None],
    leaving_word: AbstractContextManager,
) -> None:
    """Do this rank's part, whichever it is.

    Args:
        train: what a trainer does, with the language model that is elsewhere.
        leaving_word: takes note of an error before process groups are left.
    """
    placement, stream = config.placement(), config.stream
    assert placement is not None
    assert stream is not None
    minutes = config.launcher.timeout_minutes
    sizes = {TRAINERS: placement.trainers.world_size, PRODUCERS: placement.producers.world_size}
    with join_world(sizes, timeout_minutes=minutes) as world:
        layout = config.layout() if world.name == TRAINERS else placement.producers
        with initialize(layout, timeout_minutes=minutes, world=world) as context, leaving_word:
            on_host = context.device.type == "cpu" or stream.buffer_device == "host"
            link = Link(world, device=torch.device("cpu") if on_host else context.device)
            if world.name == TRAINERS:
                source = RemoteSource(link, placement, context, world.everyone)
                stop.ask_also(source.stop_asked)
                train(context, source)
            else:
                _produce(config, link, context, world, stop)


def _produce(config: RunConfig, link: Link, context: ParallelContext, world: World, stop: StopRequest) -> None:
    placement, stream = config.placement(), config.stream
    assert placement is not None
    assert stream is not None
    assert config.sae is not None
    source = build_source(stream, config.sae.all_hooks, context)
    dtype, store = buffer_dtype(stream, source), world.everyone
    producer = Producer(source, link, placement, context, store=store, dtype=dtype)
    producer.serve(lambda: stop.name)
