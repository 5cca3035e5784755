"""The command line of experiments; what it starts is tested in tests/experiments."""

from pathlib import Path

import pytest

from launch.experiment import load_experiment, main, sizes
from steerscale.config import from_mapping, load_yaml, to_mapping
from steerscale.errors import ConfigError


def test_help_lists_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "othello/small" in sizes()
    assert all(f"  {name}  " in out for name in sizes())


@pytest.mark.parametrize("name", sizes())
def test_every_size_is_a_valid_configuration(name: str) -> None:
    _, config = load_experiment(name, ["name=other", "seed=3"])
    assert (config.name, config.run_dir, config.seed) == ("other", "runs/other", 3)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["othello/smal"], "did you mean othello/small?"),
        (["chess"], "othello/paper, othello/small"),
        (["othello/small", "games.trian=3"], "did you mean 'train'?"),
        (["othello/small", "gpt.optim.lrr=3"], "did you mean 'lr'?"),
        (["othello/small", "games.train=many"], "games.train must be a whole number"),
        (["othello/small", "model=demo"], "unknown key 'model'"),
        (["othello/small", "run_dir=/dev/null"], "run_dir=/dev/null cannot be made: File exists"),
        (["othello/small", "run_dir=/dev/null/a"], "run_dir=/dev/null/a cannot be made: Not a directory"),
        ([], "NAME/SIZE"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert told in err
    assert not list(tmp_path.iterdir())


def test_configuration_is_shown_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["othello/small", "seed=5", "--cfg"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    experiment, config = load_experiment("othello/small", ["seed=5"])
    assert from_mapping(experiment.config, load_yaml(shown)) == config
    assert to_mapping(config)["gpt"]["seed"] == 5


def test_a_typo_in_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.compose

    directory = tmp_path / "experiment" / "othello"
    directory.mkdir(parents=True)
    text = (launch.compose.CONFIGS / "experiment" / "othello" / "small.yaml").read_text(encoding="utf-8")
    (directory / "small.yaml").write_text(text.replace("games:", "gmaes:"), encoding="utf-8")
    monkeypatch.setattr(launch.compose, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'games'"):
        load_experiment("othello/small")
