import json
import subprocess
import sys

import numpy as np
import pytest

from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream, inspect_data
from steerscale.errors import DataError


def test_a_sample_is_one_slice_of_the_corpus(counted):
    stream = SampleStream(DataConfig(path=str(counted)), seq_len=10, seed=1)
    for position in (0, 1, 500, 10**9):
        sample = stream.tokens(position)
        start = stream.sample_id(position).start
        assert sample.dtype == np.int64
        assert sample.tolist() == [*range(start + 1, start + 12)]


def test_an_epoch_reads_almost_every_token_once(counted):
    stream = SampleStream(DataConfig(path=str(counted)), seq_len=10, seed=1)
    (size,) = stream.samples_per_epoch
    for epoch in range(3):
        inputs = [token for p in range(epoch * size, (epoch + 1) * size) for token in stream.tokens(p)[:-1]]
        assert len(set(inputs)) == len(inputs) == size * 10 == 990


def test_order_depends_on_the_seed(counted):
    def starts(seed):
        stream = SampleStream(DataConfig(path=str(counted)), seq_len=10, seed=seed)
        return [stream.sample_id(position).start for position in range(50)]

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)


def test_validation_goes_through_once_in_order(counted):
    stream = SampleStream(DataConfig(path=str(counted)), seq_len=10, split="valid", shuffle=False)
    assert stream.num_samples == 10  # 104 tokens
    samples = [stream.tokens(position) for position in range(10)]
    assert [token for sample in samples for token in sample[:-1]] == list(range(1, 101))
    with pytest.raises(DataError, match="ends at position 9, 10 was asked for"):
        stream.tokens(10)


def test_skip_leaves_out_samples_and_keeps_the_others(counted):
    plain = SampleStream(DataConfig(path=str(counted)), seq_len=10)
    skipping = SampleStream(DataConfig(path=str(counted), skip=[[3, 5], [7, 8]]), seq_len=10)
    expected = [position for position in range(20) if position not in (3, 4, 7)]
    for position, original in enumerate(expected):
        assert np.array_equal(skipping.tokens(position), plain.tokens(original))


def test_blend_reads_each_dataset_in_its_own_order(make_dataset):
    paths = [
        make_dataset(name, {"train": [[first + k for k in range(400)]]}) for name, first in (("a", 1), ("b", 1001))
    ]
    blend = SampleStream(DataConfig(blend={str(paths[0]): 3.0, str(paths[1]): 1.0}), seq_len=10, seed=5)
    corpora = np.array([blend.sample_id(position).corpus for position in range(400)])
    assert abs((corpora == 1).sum() - 100) <= 1
    assert all((blend.tokens(p)[0] > 1000) == (corpora[p] == 1) for p in range(100))
    # The first dataset alone comes in the same order: another blend only changes where its samples stand.
    alone = SampleStream(DataConfig(path=str(paths[0])), seq_len=10, seed=5)
    mine = [blend.sample_id(int(p)).start for p in np.flatnonzero(corpora == 0)[:100]]
    assert mine == [alone.sample_id(position).start for position in range(100)]


def test_properties(make_dataset):
    a, b = (make_dataset(name, {"train": [[1] * 99], "valid": [[1] * 49]}) for name in "ab")
    manifest = b / "manifest.json"
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["bytes"] = 100 * 7
    values["splits"]["valid"]["bytes"] = 50 * 5
    manifest.write_text(json.dumps(values))
    config = DataConfig(blend={str(a): 3.0, str(b): 1.0})
    train = SampleStream(config, seq_len=10)
    assert train.bytes_per_token == pytest.approx(0.75 * 3 + 0.25 * 7)
    assert (train.num_samples, train.vocab_size, train.eos_id, train.tokenizer_hash) == (None, 5000, 0, "abc")
    valid = SampleStream(config, seq_len=10, split="valid", shuffle=False)
    assert valid.bytes_per_token == pytest.approx((3 + 5) / 2)
    assert valid.num_samples == 8


def test_mixed_tokenizers_are_refused(make_dataset):
    a = make_dataset("a", {"train": [[1] * 99]})
    b = make_dataset("b", {"train": [[1] * 99]}, hash="def")
    with pytest.raises(DataError, match=r"mixes tokenizers: .*a was made with .* hash abc, .*b with .* hash def"):
        inspect_data(DataConfig(blend={str(a): 1.0, str(b): 1.0}), seq_len=8)


def test_problems_show_before_training(counted):
    with pytest.raises(DataError, match="fewer than one sequence"):
        inspect_data(DataConfig(path=str(counted)), seq_len=2000)
    with pytest.raises(DataError, match="no split 'test'"):
        inspect_data(DataConfig(path=str(counted)), seq_len=10, split="test")


def test_reading_and_preparing_need_no_torch():
    code = "import sys, steerscale.data.dataset, steerscale.data.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
