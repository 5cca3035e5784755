"""An SAE run whose language model has nodes of its own, on a real Slurm: through the signal before the time limit."""

from dataclasses import replace
from pathlib import Path

import pytest

from steerscale.activations.config import ProducersConfig
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.jobs.journal import read_journal
from steerscale.jobs.slurm import signal_script
from steerscale.jobs.submit import submit
from steerscale.metrics import read_records
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import TrainConfig
from tests.sae.training import language_model, sae_config
from tests.slurm.test_runs import decisions
from tests.slurm.testbed import has_ended, on_testbed, wait_for, wait_for_step
from tests.train.runs import moved, prepare, train

STEPS = 150


@pytest.mark.usefixtures("testbed")
def test_trainers_and_producers_go_on_after_a_signal(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    lm = language_model(german_data, tmp_path / "lm")
    pool.run(train, lm, ranks=1)
    sections = {
        "train": TrainConfig(steps=STEPS, eval_interval=50, eval_samples=4),
        "checkpoint": CheckpointConfig(interval=1000, keep=0),
    }
    alone = sae_config(lm, german_data, tmp_path / "alone", sections=sections)
    pool.run(train, prepare(alone), ranks=1)
    assert alone.stream is not None
    producers = replace(alone.stream, producers=ProducersConfig(pipeline=2))
    parallel = replace(alone.parallel, tensor=2)
    config = on_testbed(moved(alone, tmp_path / "apart", stream=producers, parallel=parallel))
    run_dir = Path(config.run_dir)
    job = submit([config], command=["test"])
    wait_for_step(run_dir, 5)
    signal_script(job, "USR1")
    ended = wait_for(run_dir, has_ended)
    assert (ended.state, ended.job, ended.restarts) == ("finished", job, 1)
    assert decisions(run_dir) == ["go_on", "finished"]
    assert 5 <= read_journal(run_dir).starts[1]["step"] < STEPS
    assert {path.name for path in (run_dir / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(4)}
    got, wanted = (read_records(Path(one.run_dir), "train") for one in (config, alone))
    assert [record["consumed_hash"] for record in got] == [record["consumed_hash"] for record in wanted]
    losses = [record["loss"] for record in wanted]
    assert [record["loss"] for record in got] == pytest.approx(losses, rel=SAE.loss)
