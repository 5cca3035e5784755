"""`--cfg` and `--help`."""

from pathlib import Path

import pytest
import yaml

from launch.train import main

NEEDED = "train.steps"


def test_cfg_prints_what_a_run_would_get(
    workplace: Path, german_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cfg", f"data.path={german_data}", "train.steps=3", "model.num_layers=2"]) == 0
    printed = capsys.readouterr()
    mapping = yaml.safe_load(printed.out)
    assert printed.err == ""
    assert mapping["model"]["vocab_size"] == 1000
    assert mapping["run_dir"] == str(workplace / "runs" / "gpt")
    (workplace / "again.yaml").write_text(printed.out, encoding="utf-8")
    assert main(["--cfg", "--config-name", "again.yaml"]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["--cfg", "--config-name", str(workplace / "again.yaml"), "seed=5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {**mapping, "seed": 5}
    assert sorted(path.name for path in workplace.iterdir()) == ["again.yaml"]


def test_cfg_works_before_everything_is_known(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "model=6.7b"]) == 0
    printed = capsys.readouterr()
    mapping = yaml.safe_load(printed.out)
    assert (mapping["model"]["d_model"], mapping["train"]["steps"]) == (4096, "???")
    assert printed.err == "note: not checked, since a run needs train.steps, data.path as well\n"
    (workplace / "part.yaml").write_text(printed.out, encoding="utf-8")
    assert main(["--cfg", "--config-name", "part.yaml", "launcher.name=dry_run", "train.steps=4"]) == 2
    assert "needs model.vocab_size" in capsys.readouterr().err
    complete = ["launcher.name=dry_run", "train.steps=4", "model.vocab_size=50"]
    assert main(["--cfg", "--config-name", "part.yaml", *complete]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["d_model"] == 4096


def test_cfg_checks_what_is_complete(workplace: Path, german_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", f"data.path={german_data}", "train.steps=3", "parallel.tensor=3"]) == 2
    assert "3 does not divide" in capsys.readouterr().err


def test_cfg_prints_all_points_of_a_sweep(
    workplace: Path, german_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-m", "--cfg", f"data.path={german_data}", "train.steps=3", "seed=1,2", "name=s${seed}"]
    assert main(argv) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(document["seed"], document["name"]) for document in documents] == [(1, "s1"), (2, "s2")]


def test_help_names_groups_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for part in ("--multirun", "--cfg", "--config-name", "7b_gqa_swiglu", "german_demo", "docs/configuration.md"):
        assert part in shown
