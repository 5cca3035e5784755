from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.testbed import Testbed, running_testbed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `slurm`, and has to wait longer than other tests where the machine is busy."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="package")
def testbed() -> Iterator[Testbed]:
    """A Slurm without accounting, one for all tests here. Skips where testbed.sh says that there can be none."""
    with running_testbed() as testbed:
        yield testbed


@pytest.fixture(scope="module")
def accounted_testbed() -> Iterator[Testbed]:
    """A Slurm with accounting. Skips like `testbed`."""
    with running_testbed(accounting=True) as testbed:
        yield testbed
