import typing
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import launch.config_docs
from launch.compose import section
from launch.config_docs import MARKER, TARGET, field_docs, main, render
from steerscale.errors import ConfigError
from steerscale.optim import OptimConfig
from steerscale.train.config import RunConfig


@dataclass
class Undocumented:
    """A section."""

    first: int = 1
    """Has one."""
    second: int = 2


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the page that the tests may change."""
    path = tmp_path / "configuration.md"
    path.write_text(TARGET.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(launch.config_docs, "TARGET", path)
    return path


def test_the_page_is_current() -> None:
    assert main(["--check"]) == 0, "run python -m launch.config_docs"


def test_check_notices_a_stale_page_and_writing_mends_it(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    current = page.read_text(encoding="utf-8")
    page.write_text(current.replace("`optim.lr` | number", "`optim.lr` | text"), encoding="utf-8")
    assert main(["--check"]) == 1
    assert "is not current: run `python -m launch.config_docs`" in capsys.readouterr().err
    assert main([]) == 0
    assert page.read_text(encoding="utf-8") == current
    page.write_text("by hand\n" + current.replace("\n## Keys\n", ""), encoding="utf-8")
    main([])
    assert page.read_text(encoding="utf-8") == "by hand\n" + current


def test_a_page_without_the_marker_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks the line"):
        render("# Configuration\n")


def test_every_key_stands_in_the_page_once() -> None:
    text = TARGET.read_text(encoding="utf-8").partition(MARKER)[2]

    def keys(cls: type, at: str = "") -> list[str]:
        hints = typing.get_type_hints(cls)
        found = []
        for field in fields(cls):  # type: ignore[arg-type]
            nested = section(hints[field.name])
            found += keys(nested, f"{at}{field.name}.") if nested else [f"{at}{field.name}"]
        return found

    assert len(keys(RunConfig)) > 60
    for key in keys(RunConfig):
        assert text.count(f"\n| `{key}` | ") == (3 if key == "seed" else 1), key  # both commands have a --seed as well


def test_field_docs_are_the_docstrings_under_the_fields() -> None:
    docs = field_docs(OptimConfig)
    assert list(docs) == [field.name for field in fields(OptimConfig)]
    assert docs["lr"] == "Peak learning rate."
    with pytest.raises(ConfigError, match=r"Undocumented\.second has no docstring"):
        field_docs(Undocumented)
