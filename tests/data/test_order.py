import numpy as np
import pytest

from steerscale.data.order import OrderedWindows, ShuffledWindows, Skip, permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65537])
def test_permute_is_a_bijection(size):
    result = permute(np.arange(size), size=size, key="k")
    assert np.array_equal(np.sort(result), np.arange(size))


def test_permute_does_not_depend_on_what_is_asked_together():
    whole = permute(np.arange(1000), size=1000, key="k")
    assert permute(np.array([731]), size=1000, key="k")[0] == whole[731]
    assert np.array_equal(permute(np.arange(1000)[::-7], size=1000, key="k"), whole[::-7])


def test_permute_looks_shuffled():
    size = 20000
    identity = np.arange(size)
    first, second = (permute(identity, size=size, key=key) for key in ("a", "b"))
    # Expected for random permutations: about one fixed point, correlation within 1/sqrt(size) = 0.007.
    for shuffled in (first, second, permute(second, size=size, key="a")):
        assert (shuffled == identity).sum() < 8
        assert abs(np.corrcoef(shuffled, identity)[0, 1]) < 0.03
        assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.03
        assert (np.diff(shuffled) == 1).sum() < 8
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    # Each tenth of the output draws evenly from each tenth of the domain: chi-square with 81 degrees of freedom.
    table = np.histogram2d(identity, first, bins=10)[0]
    assert ((table - size / 100) ** 2 / (size / 100)).sum() < 140


def test_permute_handles_sizes_beyond_32_bits():
    size = 10**13
    places = np.arange(0, size, size // 1000)
    result = permute(places, size=size, key="k")
    assert len(np.unique(result)) == len(places)
    assert 0 <= result.min() < result.max() < size


@pytest.mark.parametrize("num_tokens", [9, 10, 15, 16, 17, 24, 25, 100, 103, 1000])
def test_shuffled_windows_lie_inside_and_do_not_overlap(num_tokens):
    windows = ShuffledWindows(num_tokens=num_tokens, seq_len=8, key="k")
    offsets = set()
    for epoch in range(40):
        positions = np.arange(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        starts = np.sort(windows.starts(positions))
        offsets.add(int(starts[0]) % 8)
        assert starts[0] >= 0
        assert starts[-1] + 8 + 1 <= num_tokens
        assert (np.diff(starts) == 8).all()
        # What the docstring promises about the tokens that are left out.
        assert num_tokens - (windows.per_epoch * 8 + 1) < 2 * 8
    if num_tokens >= 16:
        assert offsets == set(range(8))


def test_windows_without_offset_are_whole_documents_of_their_length():
    windows = ShuffledWindows(num_tokens=800, seq_len=8, key="k", random_offset=False)
    starts = windows.starts(np.arange(3 * windows.per_epoch)).reshape(3, -1)
    assert (np.sort(starts) == np.arange(windows.per_epoch) * 8).all()
    assert not np.array_equal(starts[0], starts[1])


def test_epochs_differ_and_follow_the_key():
    def starts(key):
        return ShuffledWindows(num_tokens=1000, seq_len=8, key=key).starts(np.arange(4 * 124)).reshape(4, 124)

    epochs = starts("k")
    assert np.array_equal(epochs, starts("k"))
    assert not np.array_equal(epochs, starts("other"))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_ordered_windows_predict_each_token_once():
    windows = OrderedWindows(num_tokens=104, seq_len=8)
    labels = [token for start in windows.starts(np.arange(windows.per_epoch)) for token in range(start + 1, start + 9)]
    assert labels == list(range(1, 97))  # 7 tokens, fewer than a sequence, are left over
    assert OrderedWindows(num_tokens=105, seq_len=8).per_epoch == 13


@pytest.mark.parametrize(
    "ranges", [[], [[0, 3]], [[5, 6], [2, 4]], [[2, 6], [4, 8], [5, 7]], [[3, 5], [5, 9], [20, 30]]]
)
def test_skip_leaves_out_exactly_the_ranges(ranges):
    left_out = {position for start, end in ranges for position in range(start, end)}
    remaining = [position for position in range(60) if position not in left_out]
    assert Skip(ranges)(np.arange(len(remaining))).tolist() == remaining
