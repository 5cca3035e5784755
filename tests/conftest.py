from collections.abc import Iterator

import pytest

from steerscale.testing.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Persistent gloo ranks, started when first used."""
    ranks = RankPool()
    yield ranks
    ranks.close()
