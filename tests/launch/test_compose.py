import shutil
from pathlib import Path
from typing import Any

import pytest

import launch.compose
from launch.compose import compose_config, defaults_of, expand_sweep, groups, options
from launch.train import main
from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.train.config import RunConfig

EXPERIMENT = """# @package _global_
defaults:
  - override /model: 125m
  - override /launcher: dry_run

name: mine
model:
  num_layers: 6
optim:
  lr: 1.0e-3
train:
  steps: 50
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """configs/ with an experiment called `mine`; its path."""
    configs = tmp_path / "configs"
    shutil.copytree(launch.compose.CONFIGS, configs)
    (configs / "experiment" / "mine.yaml").write_text(EXPERIMENT, encoding="utf-8")
    monkeypatch.setattr(launch.compose, "CONFIGS", configs)
    return configs / "experiment" / "mine.yaml"


def test_defaults_are_those_of_the_dataclasses() -> None:
    composed = compose_config(["train.steps=5", "data.path=/d"])
    composed["model"] = {**composed["model"]}
    config = from_mapping(RunConfig, composed)
    plain = from_mapping(
        RunConfig,
        {
            "name": "gpt",
            "run_dir": "runs/gpt",
            "model": composed["model"],
            "train": {"steps": 5},
            "data": {"path": "/d"},
        },
    )
    assert config == plain


def test_experiment_beats_groups_and_the_command_line_beats_all(experiment: Path) -> None:
    composed = compose_config(["experiment=mine"])
    assert (composed["name"], composed["run_dir"]) == ("mine", "runs/mine")
    assert (composed["model"]["d_model"], composed["model"]["num_layers"]) == (768, 6)
    assert composed["launcher"]["name"] == "dry_run"
    assert composed["optim"]["lr"] == 1e-3
    composed = compose_config(
        ["experiment=mine", "model=350m", "launcher=local", "optim.lr=2e-3", "name=yours", "model.num_heads=8"]
    )
    assert (composed["name"], composed["run_dir"]) == ("yours", "runs/yours")
    # The experiment's own keys still apply to the chosen model; only a key on the command line is stronger.
    assert (composed["model"]["d_model"], composed["model"]["num_layers"]) == (1024, 6)
    assert composed["model"]["num_heads"] == 8
    assert composed["launcher"]["name"] == "local"
    assert composed["optim"]["lr"] == 2e-3
    assert compose_config(["model.num_layers=3", "experiment=mine"])["model"]["num_layers"] == 3


def test_german_demo_keeps_its_name_and_can_be_changed() -> None:
    composed = compose_config(["experiment=german_demo", "parallel.tensor=1"])
    assert (composed["name"], composed["run_dir"]) == ("german_demo", "runs/german_demo")
    assert (composed["parallel"]["tensor"], composed["parallel"]["pipeline"]) == (1, 2)
    assert composed["model"]["activation"] == "swiglu"
    from_mapping(RunConfig, composed).layout()


def test_the_last_of_two_values_counts() -> None:
    composed = compose_config(["model=125m", "train.steps=1", "model=350m", "train.steps=2"])
    assert (composed["model"]["d_model"], composed["train"]["steps"]) == (1024, 2)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_plus_signs_make_no_difference(plus: str) -> None:
    composed = compose_config(
        [f"{plus}train.steps=3", f"{plus}train.ramp_up.start=2", f"{plus}model=125m"], partial=True
    )
    assert composed["train"]["steps"] == 3
    assert composed["train"]["ramp_up"] == {"start": 2}
    assert composed["model"]["d_model"] == 768


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("name=2024_05", "2024_05"),
        ("name=7", "7"),
        ("name=1e3", "1e3"),
        ("name=true", "true"),
        ("name='a, b'", "a, b"),
        ("data.path=007", "007"),
        ("data.path=null", None),
        ("name=x_${parallel.tensor}", "x_1"),
        ("name='x_${parallel.tensor}'", "x_1"),
    ],
)
def test_text_stays_as_it_was_written(written: str, value: Any) -> None:
    composed = compose_config([written, "train.steps=1"])
    assert (composed["name"] if written.startswith("name") else composed["data"]["path"]) == value


def test_every_preset_and_launcher_composes() -> None:
    assert {"cluster", "experiment", "launcher", "model"} <= set(groups())
    for model in options("model"):
        composed = compose_config([f"model={model}", "train.steps=1", "data.path=/d"])
        from_mapping(RunConfig, composed).layout()
    for launcher in options("launcher"):
        composed = compose_config([f"launcher={launcher}", "train.steps=1", "data.path=/d"])
        assert from_mapping(RunConfig, composed).launcher.name == launcher


def test_expand_sweep_varies_the_last_key_fastest() -> None:
    jobs = expand_sweep(["parallel.tensor=1,2", "seed=range(2)", "name=x_${seed}", "model=glob(*b,exclude=1*)"])
    assert jobs[0] == ["parallel.tensor=1", "seed=0", "name=x_${seed}", "model=2.7b"]
    assert jobs[1] == ["parallel.tensor=1", "seed=0", "name=x_${seed}", "model=6.7b"]
    assert [job[:2] for job in jobs[::2]] == [
        ["parallel.tensor=1", "seed=0"],
        ["parallel.tensor=1", "seed=1"],
        ["parallel.tensor=2", "seed=0"],
        ["parallel.tensor=2", "seed=1"],
    ]
    assert expand_sweep(["launcher.ranks=[0,1]"]) == [["launcher.ranks=[0,1]"]]


def test_defaults_mark_what_has_none() -> None:
    defaults = defaults_of(RunConfig)
    assert defaults["train"]["steps"] == "???"
    assert defaults["train"]["ramp_up"] is None
    assert defaults["data"]["path"] is None
    assert defaults["launcher"]["ranks"] == [0]


def test_a_configuration_given_as_a_file_has_no_groups(tmp_path: Path, german_data: Path) -> None:
    assert main(["--cfg", f"data.path={german_data}", "train.steps=3"]) == 0
    path = tmp_path / "whole.yaml"
    path.write_text("name: mine\nrun_dir: /r\ntrain: {steps: 4}\n", encoding="utf-8")
    composed = compose_config(["optim.lr=1e-3"], config_name=str(path), partial=True)
    assert (composed["name"], composed["train"]["steps"], composed["optim"]["lr"]) == ("mine", 4, 1e-3)
    assert composed["optim"]["beta2"] == 0.95
    with pytest.raises(ConfigError, match="model=125m: a whole configuration was given"):
        compose_config(["model=125m"], config_name=str(path))
    path.write_text("name: mine\nnmae: yours\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key 'nmae': did you mean 'name'"):
        from_mapping(RunConfig, compose_config([], config_name=str(path), partial=True))
