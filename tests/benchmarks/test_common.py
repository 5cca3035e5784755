"""What benchmarks print about where they ran and what they are held against."""

import platform

import pytest

from benchmarks._common import against, environment, gpu_environment, print_environment


def test_environment_names_machine_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    found = print_environment("numpy", "no-such-package")
    assert found["python"] == platform.python_version()
    assert found["cores"] >= 1
    assert found["torch"] is not None
    assert found["no-such-package"] is None
    line = capsys.readouterr().out
    assert f"numpy {found['numpy']}" in line
    assert "no-such-package" not in line
    assert environment().keys() <= found.keys()
    assert gpu_environment()["device"]


def test_against_says_whether_a_limit_is_met() -> None:
    assert against(1.2, 1.1) == "1.2 (at least 1.1: met)"
    assert against(1.0, 1.1) == "1 (at least 1.1: NOT met)"
    assert against(1.6, 1.5, at_most=True) == "1.6 (at most 1.5: NOT met)"
    assert against(float("nan"), 1.1) == "nan (at least 1.1: NOT met)"
    assert against(None, 1.1) == "unknown"
