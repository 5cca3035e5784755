import numpy as np
import pytest

from steerscale.data.blend import PATTERN, Blend, Concatenation


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.999, 0.001], [3, 1, 1, 1, 1, 0.01]])
def test_every_prefix_is_near_the_weights(weights):
    corpus, _ = Blend(weights).locate(np.arange(2 * PATTERN + 500))
    shares = np.array(weights) / sum(weights)
    seen = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, len(corpus) + 1)[:, None] * shares
    assert np.abs(seen - ideal).max() < len(weights) + 1


def test_counts_go_by_largest_remainder():
    assert Blend([1, 1, 1]).counts.tolist() == [1366, 1365, 1365]
    assert Blend([0.7, 0.2, 0.1]).counts.tolist() == [2867, 819, 410]  # 2867.2, 819.2, 409.6


def test_each_corpus_is_read_without_gaps():
    corpus, place = Blend([0.6, 0.3, 0.1]).locate(np.arange(3 * PATTERN))
    for number in range(3):
        assert np.array_equal(place[corpus == number], np.arange((corpus == number).sum()))


def test_one_corpus_is_the_identity():
    positions = np.array([0, 1, PATTERN - 1, PATTERN, 10**15])
    corpus, place = Blend([2.5]).locate(positions)
    assert not corpus.any()
    assert np.array_equal(place, positions)


def test_concatenation():
    corpus, place = Concatenation([3, 1, 2]).locate(np.arange(6))
    assert corpus.tolist() == [0, 0, 0, 1, 2, 2]
    assert place.tolist() == [0, 1, 2, 0, 0, 1]
