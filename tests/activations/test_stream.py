"""One order of vectors for every layout, fine interleaving, exact resume."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerscale.activations.source import GPTSource
from steerscale.activations.stream import ActivationStream
from steerscale.data.consumed import ConsumedHash
from steerscale.errors import CheckpointError, ConfigError, DataError, LayoutError
from steerscale.models.hooks import capture
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.parity import ACTIVATIONS
from steerscale.testing.ranks import RankPool
from tests.activations.streams import (
    BLOCK,
    EARLY,
    EOS,
    LANES,
    LATE,
    MODELS,
    ONE,
    SEQ_LEN,
    RecordingSource,
    Seen,
    build,
    dataset,
    see,
    stream_config,
    take,
)
from tests.models.gpts import build_random

HOOKS = [EARLY, LATE]
SIZES = [64, 64, 8, 240, 160] + [64] * 12  # over several blocks of about 150 vectors a lane
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "TP2+SP": ParallelLayout(tensor=2, sequence=True),
    "PP2": ParallelLayout(pipeline=2),
    "TP2xPP2": ParallelLayout(tensor=2, pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
    "DP2": ParallelLayout(data=2),
    "DP4": ParallelLayout(data=4),
    "DP2xPP2": ParallelLayout(data=2, pipeline=2),
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, german_data: Path) -> tuple[str, Seen]:
    return request.param, see(ONE, german_data, MODELS[request.param], HOOKS, SIZES)


def whole(ranks: list[Seen], steps: int) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Ids and activations of the global batches, replica after replica; all ranks of a replica must agree."""
    replicas = max(rank.place[1] for rank in ranks) + 1
    ids, activations = [], {hook: [] for rank in ranks for hook in rank.activations}
    for step in range(steps):
        parts = []
        for replica in range(replicas):
            seen = [rank.ids[step] for rank in ranks if rank.place[1] == replica]
            assert all(np.array_equal(part, seen[0]) for part in seen)
            parts.append(seen[0])
        ids.append(np.concatenate(parts))
        for hook, batches in activations.items():
            parts = []
            for replica in range(replicas):
                seen = [r.activations[hook][step] for r in ranks if r.place[1] == replica and hook in r.activations]
                assert all(np.array_equal(part, seen[0]) for part in seen)
                parts.append(seen[0])
            batches.append(np.concatenate(parts))
    return ids, activations


def assert_same(ranks: list[Seen], expected: Seen, tolerance: float) -> None:
    ids, activations = whole(ranks, len(expected.ids))
    assert all(np.array_equal(got, wanted) for got, wanted in zip(ids, expected.ids, strict=True))
    assert activations.keys() == expected.activations.keys()
    for hook, batches in activations.items():
        for got, wanted in zip(batches, expected.activations[hook], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance, err_msg=hook)
    total = ConsumedHash.total(rank.consumed for rank in ranks if (rank.place[0], rank.place[2]) == (0, 0))
    assert total == expected.consumed
    assert all(rank.state == expected.state for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_stream(layout: str, reference: tuple[str, Seen], pool: RankPool, german_data: Path) -> None:
    name, expected = reference
    degrees = LAYOUTS[layout]
    ranks = pool.run(see, degrees, german_data, MODELS[name], HOOKS, SIZES, ranks=degrees.world_size)
    # Replicas run the very passes that one process runs; their vectors are the same bit by bit.
    same_passes = degrees.tensor == 1
    assert_same(ranks, expected, 0.0 if same_passes else ACTIVATIONS)
    for rank in ranks:
        owned = {EARLY, LATE} if degrees.pipeline == 1 else ({EARLY}, {LATE})[rank.place[0]]
        assert set(rank.activations) == owned


def test_one_process_vectors_are_the_models_at_their_ids(german_data: Path, reference: tuple[str, Seen]) -> None:
    name, seen = reference
    data = dataset(german_data)
    with initialize(ONE) as context, torch.no_grad():
        chunks = build_random(MODELS[name], context)
        for step in (0, 3, len(SIZES) - 1):
            sequences, positions = np.divmod(seen.ids[step], SEQ_LEN)
            for row in range(0, len(sequences), 7):
                tokens = torch.from_numpy(data.tokens(int(sequences[row]))[None, :-1].copy())
                with capture(chunks, HOOKS) as activations:
                    chunks[0].eval()(tokens)
                for hook in HOOKS:
                    wanted = activations[hook][0, positions[row]].numpy()
                    np.testing.assert_allclose(seen.activations[hook][step][row], wanted, rtol=0, atol=ACTIVATIONS)


def test_every_lane_gives_its_share_block_by_block(german_data: Path) -> None:
    """Each kept token exactly once in its block, and no block before the one before it is used up."""
    data = dataset(german_data)
    with initialize(ONE) as context:
        stream = build(german_data, MODELS["gpt2"], [LATE], context)
        seen = take(stream, context, SIZES)
        order = stream.order
    for lane in range(LANES):
        parts = [ids[lane * len(ids) // LANES : (lane + 1) * len(ids) // LANES] for ids in seen.ids]
        consumed = np.concatenate(parts)
        assert (consumed // SEQ_LEN % LANES == lane).all()
        begin, index = 0, 0
        while begin < len(consumed):
            sequences = [lane + LANES * (index * BLOCK + place) for place in range(BLOCK)]
            kept = [
                sequence * SEQ_LEN + position
                for sequence in sequences
                for position, token in enumerate(data.tokens(sequence)[:-1])
                if token != EOS
            ]
            got = consumed[begin : begin + len(kept)]
            if len(got) == len(kept):
                assert sorted(got) == kept
                assert list(got) != kept
            else:
                assert len(set(got)) == len(got)
                assert set(got) <= set(kept)
            begin, index = begin + len(kept), index + 1
        assert index >= 2
        assert not np.array_equal(order.block(lane, 0).order, order.block((lane + 1) % LANES, 0).order)


def test_special_tokens_and_first_positions_are_left_out(german_data: Path) -> None:
    data = dataset(german_data)
    counts = {}
    with initialize(ONE) as context:
        for changes in ({}, {"drop_special": False}, {"drop_first": 3}):
            stream = build(german_data, MODELS["gpt2"], [LATE], context, **changes)
            ids = np.concatenate(take(stream, context, [400] * 3).ids)
            tokens = np.array([data.tokens(int(i // SEQ_LEN))[i % SEQ_LEN] for i in ids])
            counts[str(changes)] = int((tokens == EOS).sum()), int((ids % SEQ_LEN < 3).sum())
    (no_eos, first), (eos, _), (_, no_first) = counts.values()
    assert (no_eos, no_first) == (0, 0)
    assert eos > 10
    assert first > 50


def test_text_of_special_tokens_alone_is_refused(german_data: Path) -> None:
    """Instead of reading on for ever; and no pass is run of which nothing is kept."""
    with initialize(ONE) as context:
        model = MODELS["gpt2"]
        special = range(dataset(german_data).vocab_size)
        source = GPTSource(build_random(model, context), [LATE], context, seq_len=SEQ_LEN, special_ids=special)
        recording = RecordingSource(source)
        stream = ActivationStream(stream_config(model), recording, dataset(german_data), context)
        with pytest.raises(DataError, match=r"10,000 sequences in a row hold nothing but .* \(1000 special ones"):
            stream.next(LANES)
        assert not recording.passes


def test_order_follows_from_seed_and_buffer_alone(german_data: Path) -> None:
    """Not from the model, its hooks, or how many sequences it reads at once."""
    with initialize(ONE) as context:
        gpt2 = take(build(german_data, MODELS["gpt2"], [LATE], context), context, SIZES).ids
        llama = build(german_data, MODELS["llama"], HOOKS, context, micro_batch_size=3)
        assert all(np.array_equal(*pair) for pair in zip(gpt2, take(llama, context, SIZES).ids, strict=True))
        other_seed = build(german_data, MODELS["gpt2"], [LATE], context, seed=1)
        other = take(other_seed, context, SIZES[:1]).ids
    assert not np.array_equal(np.sort(gpt2[0]), np.sort(other[0]))


def test_multi_hook_equals_single_hook(german_data: Path, reference: tuple[str, Seen]) -> None:
    name, both = reference
    for hook in HOOKS:
        single = see(ONE, german_data, MODELS[name], [hook], SIZES)
        assert all(np.array_equal(got, wanted) for got, wanted in zip(single.ids, both.ids, strict=True))
        for got, wanted in zip(single.activations[hook], both.activations[hook], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_production_is_interleaved_with_consumption(german_data: Path) -> None:
    """After the first fill no step waits for more than a few passes, and no pass is run twice or for nothing."""
    with initialize(ONE) as context:
        model = MODELS["gpt2"]
        source = RecordingSource(GPTSource(build_random(model, context), [LATE], context, seq_len=SEQ_LEN))
        stream = ActivationStream(stream_config(model), source, dataset(german_data), context)
        per_block = -(-BLOCK // 2)
        passes = []
        for _ in range(60):
            before = len(source.passes)
            stream.next(64)
            passes.append(len(source.passes) - before)
        blocks = sum(cursor[0] for cursor in stream.state()["cursors"])
    assert passes[0] >= LANES * per_block
    # 8 vectors of a lane a step, about 150 in a block of 3 passes: 1.3 passes a step for 8 lanes.
    assert max(passes[1:]) <= 3
    assert passes.count(0) < 20
    # The first block, each one since, and of the next ones no more than their share.
    assert (blocks + LANES) * per_block <= sum(passes) <= (blocks + 2 * LANES) * per_block


@pytest.mark.parametrize("trial", range(3))
def test_resume_is_bitwise_the_uninterrupted_stream(trial: int, german_data: Path, reference: tuple[str, Seen]) -> None:
    name, expected = reference
    cut = random.Random(f"{name}/{trial}").randrange(1, len(SIZES) - 1)
    with initialize(ONE) as context:
        first = build(german_data, MODELS[name], HOOKS, context)
        state = json.loads(json.dumps(take(first, context, SIZES[:cut]).state))
        second = build(german_data, MODELS[name], HOOKS, context)
        rest = take(second, context, SIZES[cut:], state)
        total = ConsumedHash.total([first.consumed.value, rest.consumed])
        back = take(first, context, SIZES[cut:], state)  # also into a stream that has been going on
    for seen in (rest, back):
        assert all(np.array_equal(got, wanted) for got, wanted in zip(seen.ids, expected.ids[cut:], strict=True))
        for hook in HOOKS:
            for got, wanted in zip(seen.activations[hook], expected.activations[hook][cut:], strict=True):
                np.testing.assert_array_equal(got, wanted)
        assert seen.state == expected.state
    assert total == expected.consumed


@pytest.mark.parametrize("layout", ["TP2+SPxPP2", "DP4"])
def test_resume_on_another_layout_goes_on_with_the_same_vectors(
    layout: str, german_data: Path, reference: tuple[str, Seen], pool: RankPool
) -> None:
    name, expected = reference
    cut, degrees = 6, LAYOUTS[layout]
    with initialize(ONE) as context:
        before = take(build(german_data, MODELS[name], HOOKS, context), context, SIZES[:cut])
    arguments = (german_data, MODELS[name], HOOKS, SIZES[cut:], before.state)
    ranks = pool.run(see, degrees, *arguments, ranks=degrees.world_size)
    ids, activations = whole(ranks, len(SIZES) - cut)
    assert all(np.array_equal(got, wanted) for got, wanted in zip(ids, expected.ids[cut:], strict=True))
    for hook in HOOKS:
        for got, wanted in zip(activations[hook], expected.activations[hook][cut:], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=ACTIVATIONS)
    assert all(rank.state == expected.state for rank in ranks)


def test_a_batch_may_span_blocks(german_data: Path) -> None:
    """More vectors than two blocks hold: halves are written over only after they were read."""
    with initialize(ONE) as context:
        at_once = take(build(german_data, MODELS["gpt2"], [LATE], context), context, [LANES * 500])
        slowly = take(build(german_data, MODELS["gpt2"], [LATE], context), context, [LANES * 10] * 50)
    for lane in range(LANES):
        got = slice(lane * 500, (lane + 1) * 500)
        rows = [slice(lane * 10, (lane + 1) * 10)] * 50
        np.testing.assert_array_equal(
            at_once.ids[0][got], np.concatenate([ids[row] for ids, row in zip(slowly.ids, rows)])
        )
        np.testing.assert_array_equal(
            at_once.activations[LATE][0][got],
            np.concatenate([x[row] for x, row in zip(slowly.activations[LATE], rows)]),
        )


def test_bf16_buffer_rounds_what_it_stores(german_data: Path) -> None:
    with initialize(ONE) as context:
        config = stream_config(MODELS["gpt2"])
        half = {"buffer_dtype": "bf16", "buffer_gib": config.buffer_gib / 2}
        whole_batch = build(german_data, MODELS["gpt2"], [LATE], context).next(64)
        batch = build(german_data, MODELS["gpt2"], [LATE], context, **half).next(64)
    assert torch.equal(batch.ids, whole_batch.ids)
    assert torch.equal(batch.activations[LATE], whole_batch.activations[LATE].bfloat16())


REFUSED: dict[str, tuple[dict, type[Exception], str]] = {
    "too small": (
        {"buffer_gib": 1e-6},
        ConfigError,
        r"stream\.buffer_gib=1e-06 holds less than a sequence.*at least 4\.57",
    ),
    "too large": (
        {"buffer_gib": 1e6, "buffer_vectors": 2**50},
        ConfigError,
        r"needs 10\d{5}\.\d+ GiB on .*lower stream\.buffer_gib",
    ),
    "drop_first": ({"drop_first": 32}, ConfigError, r"stream\.drop_first=32 leaves nothing of sequences of 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_are_refused(case: str, german_data: Path) -> None:
    changes, error, text = REFUSED[case]
    model = MODELS["gpt2"]
    with initialize(ONE) as context:
        source = GPTSource(build_random(model, context), [LATE], context, seq_len=SEQ_LEN)
        config = stream_config(model)
        with pytest.raises(error, match=text):
            ActivationStream(type(config)(**{**vars(config), **changes}), source, dataset(german_data), context)


def test_batches_that_the_lanes_cannot_share_are_refused(german_data: Path) -> None:
    with initialize(ONE) as context:
        stream = build(german_data, MODELS["gpt2"], [LATE], context)
        with pytest.raises(ConfigError, match=r"stream\.lanes=8 must divide the global batch: 12 vectors"):
            stream.next(12)


def refuse_replicas(layout: ParallelLayout, data: Path) -> str:
    with initialize(layout) as context, pytest.raises(LayoutError) as caught:
        build(data, MODELS["gpt2"], [LATE], context, lanes=7)
    return str(caught.value)


def test_replicas_that_cannot_share_the_lanes_are_refused(german_data: Path, pool: RankPool) -> None:
    texts = pool.run(refuse_replicas, ParallelLayout(data=2), german_data, ranks=2)
    assert all("parallel.data must divide stream.lanes: 2 does not divide 7" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "seed", "text"),
    [
        ({"lanes": 4}, 0, "lanes=8, now it is 4"),
        ({}, 1, "seed=0, now it is 1"),
        ({"drop_special": False}, 0, r"special_ids=\[2\], now it is \[\]"),
        ({"buffer_gib": 1e-3}, 0, "block_sequences=5, now it is 21"),
    ],
)
def test_state_of_another_order_is_refused(changes: dict, seed: int, text: str, german_data: Path) -> None:
    with initialize(ONE) as context:
        state = build(german_data, MODELS["gpt2"], [LATE], context).state()
        other = build(german_data, MODELS["gpt2"], [LATE], context, seed=seed, **changes)
        with pytest.raises(CheckpointError, match=text):
            other.load(state)


def test_another_tokenizer_is_refused(german_data: Path) -> None:
    model = replace(MODELS["gpt2"], vocab_size=900)
    facts = {"tokenizer_hash": "abc"}, {"tokenizer_hash": None}
    texts = (
        "another tokenizer .* than the language model's \\(abc\\)",
        "ids up to 999, the language model knows 900 tokens",
    )
    with initialize(ONE) as context:
        chunks = build_random(model, context)
        for fact, text in zip(facts, texts):
            source = GPTSource(chunks, [LATE], context, seq_len=SEQ_LEN, **fact)
            with pytest.raises(DataError, match=text):
                ActivationStream(stream_config(model), source, dataset(german_data), context)
