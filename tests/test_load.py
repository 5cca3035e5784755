"""From a trained run to text: loading, `steerscale sample`, `steerscale dashboard`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerscale.cli import main
from steerscale.dashboard.runs import find_runs
from steerscale.dashboard.table import format_table
from steerscale.errors import CheckpointError, SteerscaleError
from steerscale.load import load_gpt, newest_checkpoint
from steerscale.models.sharding import gather_parameters
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.rundir import create_run_dir
from steerscale.testing.parity import train_curve
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from tests.parity.runs import MODELS, layout, run_config


@pytest.fixture(scope="module")
def trained(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict]:
    """A run of two tensor ranks, and the whole parameters it ended with."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    config = run_config(german_data, run_dir, MODELS["llama"], layout(tensor=2), steps=3)
    create_run_dir(run_dir, config, command=["test"])
    curve, _ = pool.run(train_curve, config, ranks=2)
    return config, curve.parameters


def loaded_parameters(run_dir: Path, ranks: ParallelLayout) -> dict[str, torch.Tensor]:
    with initialize(ranks) as context:
        return gather_parameters(load_gpt(run_dir, context).chunks, context)


@pytest.mark.parametrize("ranks", [ParallelLayout(), ParallelLayout(pipeline=2)], ids=str)
def test_load_gpt_has_the_trained_weights_on_any_layout(
    ranks: ParallelLayout, trained: tuple[RunConfig, dict], pool: RankPool
) -> None:
    config, parameters = trained
    loaded = pool.run(loaded_parameters, Path(config.run_dir), ranks, ranks=ranks.world_size)[0]
    assert loaded.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(loaded[name], torch.from_numpy(value)), name


def test_newest_checkpoint_passes_over_a_damaged_one(trained: tuple[RunConfig, dict], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)
    whole = newest_checkpoint(Path(trained[0].run_dir))
    (whole.parent / "step_99999999").mkdir()
    try:
        assert newest_checkpoint(Path(trained[0].run_dir)) == whole
    finally:
        (whole.parent / "step_99999999").rmdir()


def test_sample_command_prints_prompt_and_text(
    trained: tuple[RunConfig, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", trained[0].run_dir, "--prompt", "Das Paket", "--max-tokens", "5"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("Das Paket")
    assert main(command) == 0
    assert capsys.readouterr().out == first, "the same seed gives the same text"


def test_dashboard_command_shows_every_run(
    trained: tuple[RunConfig, dict], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["dashboard", str(Path(trained[0].run_dir).parent)]) == 0
    out = capsys.readouterr().out
    assert "parity" in out
    assert "model TFLOP/s" in out
    assert main(["dashboard", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_dashboard_measures_since_the_last_start(trained: tuple[RunConfig, dict], tmp_path: Path) -> None:
    config = replace(trained[0], run_dir=str(tmp_path / "run"))
    create_run_dir(tmp_path / "run", config, command=["test"])
    records = [
        {"kind": "start", "step": 0, "layout": "TP1", "device": "CPU"},
        {"kind": "train", "step": 1, "loss": 3.0, "seconds_per_step": 9.0},
        {"kind": "start", "step": 1, "layout": "TP2", "device": "CPU"},
        {"kind": "train", "step": 2, "loss": 2.0, "seconds_per_step": 1.0},
        {"kind": "train", "step": 3, "loss": 1.0, "seconds_per_step": 3.0},
        {"kind": "eval", "step": 3, "loss": 1.5, "perplexity": 4.5, "bits_per_byte": 0.7},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = find_runs([tmp_path])
    assert (run.layout, run.step) == ("TP2", 3)
    assert run.median("seconds_per_step") == 2.0
    assert run.last("loss") == 1.0
    assert run.last_evaluation("bits_per_byte") == 0.7
    assert run.median("mfu") is None
    table = format_table([run]).splitlines()
    assert "2.00 s" in table[1]
    assert table[0].index("MFU") > 0


def test_find_runs_refuses_a_directory_without_any(tmp_path: Path) -> None:
    with pytest.raises(SteerscaleError, match="is no run directory and holds none"):
        find_runs([tmp_path])
