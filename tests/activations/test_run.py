"""From a run directory and a dataset to batches, with and without a cache on disk."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerscale.activations.cache import CachedSource
from steerscale.activations.config import StreamConfig
from steerscale.activations.order import GIB
from steerscale.activations.source import GPTSource
from steerscale.activations.stream import ActivationStream, build_stream
from steerscale.data.config import DataConfig
from steerscale.errors import CheckpointError, DataError
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.rundir import create_run_dir
from steerscale.testing.parity import ACTIVATIONS, train_curve
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from tests.activations.streams import (
    EARLY,
    LATE,
    MODELS,
    ONE,
    SEQ_LEN,
    RecordingSource,
    Seen,
    dataset,
    stream_config,
    take,
)
from tests.models.gpts import build_random
from tests.parity.runs import MODELS as TRAINED
from tests.parity.runs import layout, run_config

SIZES = [64] * 12


@pytest.fixture(scope="module")
def trained(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two steps on two tensor ranks."""
    config = run_config(
        german_data, tmp_path_factory.mktemp("runs") / "lm", TRAINED["llama"], layout(tensor=2), steps=2
    )
    create_run_dir(Path(config.run_dir), config, command=["test"])
    pool.run(train_curve, config, ranks=2)
    return config


def config_for(lm: RunConfig, **changes: Any) -> StreamConfig:
    model = lm.model
    buffer = 2 * 4 * 6 * model.seq_len * model.d_model * 4 / GIB * 1.01
    return StreamConfig(lm=lm.run_dir, lanes=4, micro_batch_size=2, buffer_gib=buffer, **changes)


def stream_run(
    degrees: ParallelLayout,
    config: StreamConfig,
    data: Path,
    hooks: Sequence[str],
    state: dict | None = None,
) -> Seen:
    with initialize(degrees) as context:
        built = build_stream(config, data=DataConfig(path=str(data)), hooks=hooks, context=context, seed=3)
        with closing(built) as stream:
            return take(stream, context, SIZES, state)


def assert_same(got: Seen, expected: Seen, hook: str, tolerance: float) -> None:
    assert all(np.array_equal(*pair) for pair in zip(got.ids, expected.ids, strict=True))
    for x, y in zip(got.activations[hook], expected.activations[hook], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def test_stream_of_a_run_on_other_layouts(trained: RunConfig, german_data: Path, pool: RankPool) -> None:
    hooks = ["blocks.1.hook_resid_post"]
    config = config_for(trained)
    expected = stream_run(ONE, config, german_data, hooks)
    assert len({id for ids in expected.ids for id in ids.tolist()}) == sum(SIZES)
    for rank in pool.run(stream_run, ParallelLayout(tensor=2), config, german_data, hooks, ranks=2):
        assert_same(rank, expected, hooks[0], ACTIVATIONS)


def test_another_checkpoint_is_another_stream(trained: RunConfig, german_data: Path) -> None:
    hooks = ["blocks.1.hook_resid_post"]
    state = stream_run(ONE, config_for(trained), german_data, hooks).state
    with pytest.raises(CheckpointError, match=r"had lm='step_00000002-.*now it is 'step_00000002-"):
        stream_run(ONE, config_for(trained, precision="bf16", buffer_dtype="fp32"), german_data, hooks, state)


def cached(
    degrees: ParallelLayout,
    data: Path,
    hooks: Sequence[str],
    directory: Path,
    *,
    seed: int = 0,
    micro_batch_size: int = 2,
) -> tuple[Seen, int]:
    """A stream through a cache, and how many forward passes the model was run for."""
    model = MODELS["gpt2"]
    with initialize(degrees) as context:
        source = GPTSource(build_random(model, context), hooks, context, seq_len=SEQ_LEN, identity="gpt2-random")
        recording = RecordingSource(source)
        config = stream_config(model, hooks=len(hooks), micro_batch_size=micro_batch_size)
        stream = ActivationStream(config, CachedSource(recording, directory, context), dataset(data), context, seed)
        with closing(stream):
            return take(stream, context, SIZES), len(recording.passes)


def test_cache_is_read_back_in_the_same_order(german_data: Path, tmp_path: Path, pool: RankPool) -> None:
    hooks = [EARLY, LATE]
    first, passes = cached(ONE, german_data, hooks, tmp_path)
    assert passes > 0
    assert len(list(tmp_path.glob("gpt2-random/*/*.safetensors"))) == 2 * passes
    again, none = cached(ONE, german_data, hooks, tmp_path)
    assert none == 0
    for hook in hooks:
        assert_same(again, first, hook, 0.0)
    single, none = cached(ONE, german_data, [LATE], tmp_path)
    assert none == 0
    assert_same(single, first, LATE, 0.0)
    # Another layout reads what this one wrote, and so does another order; other passes are not there.
    for rank, none in pool.run(cached, ParallelLayout(tensor=2, pipeline=2), german_data, hooks, tmp_path, ranks=4):
        assert none == 0
        (hook,) = rank.activations
        assert_same(rank, first, hook, 0.0)
    other, none = cached(ONE, german_data, [LATE], tmp_path, seed=1)
    assert none == 0
    assert not np.array_equal(other.ids[0], first.ids[0])
    assert cached(ONE, german_data, [LATE], tmp_path, micro_batch_size=3)[1] > 0


def test_cache_is_filled_by_a_sharded_model(german_data: Path, tmp_path: Path, pool: RankPool) -> None:
    degrees = ParallelLayout(tensor=2, pipeline=2)
    written = pool.run(cached, degrees, german_data, [EARLY, LATE], tmp_path, ranks=4)
    assert len({passes for _, passes in written}) == 1
    seen, none = cached(ONE, german_data, [EARLY, LATE], tmp_path)
    assert none == 0
    for rank, _ in written:
        (hook,) = rank.activations
        assert_same(rank, seen, hook, 0.0)


def test_damaged_cache_is_named(german_data: Path, tmp_path: Path) -> None:
    cached(ONE, german_data, [LATE], tmp_path)
    file = sorted(tmp_path.glob("gpt2-random/*/*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{file.name} in stream.cache is damaged .*: remove it"):
        cached(ONE, german_data, [LATE], tmp_path)
