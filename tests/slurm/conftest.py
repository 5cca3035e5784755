import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.testbed import Testbed, running_testbed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `slurm`, and has to wait longer than other tests where the machine is busy."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "slurm/testbed.sh needs root"
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        return "slurm/testbed.sh needs Debian, or Slurm's daemons"
    return None


@pytest.fixture(scope="module")
def testbed() -> Iterator[Testbed]:
    """A Slurm without accounting."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    with running_testbed() as testbed:
        yield testbed


@pytest.fixture(scope="module")
def accounted_testbed() -> Iterator[Testbed]:
    """A Slurm with accounting."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    with running_testbed(accounting=True) as testbed:
        yield testbed
