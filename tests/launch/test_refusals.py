"""Bad configurations: each is one clear line with key and value, status 2, and nothing is written."""

import shlex
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import launch.compose
from steerscale.data.manifest import inspect_dataset
from tests.launch.bad_configs import CASES
from tests.launch.conftest import Refusal


@pytest.mark.usefixtures("other_run", "sae_run", "learned", "untrained")
@pytest.mark.parametrize("case", CASES)
def test_refuses_with_one_clear_line(case: str, refusal: Refusal, datasets: dict[str, Path], workplace: Path) -> None:
    (workplace / "a_file").write_text("mine", encoding="utf-8")
    (workplace / "notes").mkdir()
    (workplace / "notes" / "todo.txt").write_text("mine", encoding="utf-8")
    (workplace / "dangling").symlink_to("gone")
    arguments, parts = CASES[case]
    held_out = inspect_dataset(datasets["good"]).splits["valid"].tokens
    text = refusal(*shlex.split(arguments.format(**datasets, held_out=held_out)))
    for part in parts:
        assert part.format() in text


def test_wandb_must_be_installed(refusal: Refusal, datasets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f"data.path={datasets['good']} train.steps=10 metrics.wandb_project=tokens".split()
    # W&B's own output folder in the current directory looks like a package without an origin.
    for found in (None, ModuleSpec("wandb", None)):
        monkeypatch.setattr("launch.check.importlib.util.find_spec", lambda name, found=found: found)
        text = refusal(*arguments)
        assert "metrics.wandb_project=tokens" in text
        assert "pip install 'steerscale[wandb]'" in text


def test_run_dir_must_be_writable(refusal: Refusal, datasets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.check.os.access", lambda path, mode: False)
    text = refusal(f"data.path={datasets['good']}", "train.steps=10")
    assert "runs/gpt cannot be written" in text
    assert "is not writable here" in text


def test_each_message_fits_a_screen(datasets: dict[str, Path], refusal: Refusal) -> None:
    text = refusal(f"data.path={datasets['good']}", "train.steps=10", "model=nothing_like_it")
    assert len(text) < 400


@pytest.mark.parametrize(
    ("files", "overrides", "parts"),
    [
        ({"model/demo.yaml": "num_layers: [1\n"}, [], ("not valid YAML", "demo.yaml")),
        ({"experiment/mine.yaml": "seed: 3\n"}, ["experiment=mine"], ("# @package _global_",)),
        (
            {"experiment/mine.yaml": "# @package _global_\noptim:\n  lrr: 1\n"},
            ["experiment=mine"],
            ("unknown key 'optim.lrr'", "did you mean 'lr'?"),
        ),
        (
            {"experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: 8b\n"},
            ["experiment=mine"],
            ("model/8b", "demo"),
        ),
    ],
    ids=["broken", "no package", "typo", "missing option"],
)
def test_refuses_bad_config_files(
    files: dict[str, str],
    overrides: list[str],
    parts: tuple[str, ...],
    refusal: Refusal,
    datasets: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    configs = tmp_path_factory.mktemp("configs") / "configs"
    shutil.copytree(launch.compose.CONFIGS, configs)
    for name, text in files.items():
        (configs / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(launch.compose, "CONFIGS", configs)
    text = refusal(f"data.path={datasets['good']}", "train.steps=10", *overrides)
    for part in parts:
        assert part in text
