"""What is said of SAE runs before they start: both kinds of ranks, and the checkpoint they will read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch import fit
from launch.check import check_config
from launch.compose import compose_config
from launch.fit import refuse_oversized
from launch.resume import check_same_model
from launch.sae_plan import kinds_of_ranks, show_sae_plan
from launch.slurm import show_job
from steerscale.errors import CheckpointError, ConfigError
from steerscale.jobs.script import nodes_and_tasks
from steerscale.rundir import create_run_dir
from steerscale.sae.config import specs_of
from steerscale.train.config import RunConfig
from tests.launch.conftest import make_run

Configure = Callable[..., RunConfig]
APART = ("parallel.tensor=4", "stream.producers.tensor=2", "stream.producers.pipeline=2")


@pytest.fixture
def configure(workplace: Path, other_run: Path, german_data: Path) -> Configure:
    """A checked configuration of an SAE run on `other_run`."""

    def check(*overrides: str, lm: str = "other_run") -> RunConfig:
        needed = [
            f"stream.lm={lm}",
            f"data.path={german_data}",
            "train.steps=200",
            "sae.hooks=[blocks.1.hook_resid_post]",
        ]
        return check_config(compose_config([*needed, *overrides], config_name="train_sae"))

    return check


def test_plan_tells_of_both_kinds_of_ranks(configure: Configure) -> None:
    config = configure(*APART)
    assert config.num_ranks() == 8
    text = show_sae_plan(config)
    assert "trainers    4 = 4 tensor x 1 pipeline x 1 data" in text
    assert "producers   4 = 2 tensor x 2 pipeline x 1 data" in text
    trainers, producers = kinds_of_ranks(config)
    assert set(trainers.parts) == {"SAEs", "gradients", "optimizer", "latents", "buffer"}
    assert set(producers.parts) == {"model", "passes"}
    (both,) = kinds_of_ranks(configure("parallel.tensor=4"))
    assert both.parts == {**trainers.parts, **{part: both.parts[part] for part in producers.parts}}
    # 1024 latents of width 64 on four ranks, with biases, in fp32.
    assert trainers.parts["SAEs"] == (1024 * (2 * 64 + 1) + 64) // 4 * 4
    assert trainers.parts["optimizer"] == 2 * trainers.parts["SAEs"]


def test_ranks_of_either_kind_that_cannot_fit_are_refused(
    workplace: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(workplace / "big", ["model=6.7b", "model.vocab_size=51200", "engine.precision=bf16"])
    monkeypatch.setattr(fit, "local_device", lambda: "NVIDIA A100-SXM4-40GB")
    tensor = ("stream.producers.tensor=2", "parallel.tensor=2")
    refuse_oversized(configure(*tensor, lm="big"))
    with pytest.raises(ConfigError, match=r"the trainers \(TP2 .*parallel.tensor; launcher.force=true"):
        refuse_oversized(configure(*tensor, "sae.width=2097152", lm="big"))
    with pytest.raises(
        ConfigError, match=r"the producers \(TP1 .*passes .*stream.producers.tensor or stream.producers.pipe"
    ):
        refuse_oversized(configure("stream.producers.data=2", "stream.micro_batch_size=512", lm="big"))
    refuse_oversized(configure(*tensor, "sae.width=2097152", "launcher.force=true", lm="big"))


def test_job_has_tasks_for_both(configure: Configure) -> None:
    config = configure(*APART, "launcher=slurm", "cluster=alpha", "cluster.account=p", "run_dir=/data/runs/sae")
    assert nodes_and_tasks(config) == (1, 8)
    text = show_job(config)
    assert "#SBATCH --ntasks-per-node=8" in text
    assert (
        "4 ranks (tensor 4 x pipeline 1 x data 1) and stream.producers: 4 ranks (tensor 2 x pipeline 2 x data 1)"
        in text
    )
    two = configure(
        *APART,
        "parallel.data=3",
        "stream.lanes=24",
        "parallel.micro_batch_size=240",
        "launcher=slurm",
        "cluster=alpha",
        "cluster.account=p",
        "run_dir=/data/runs/sae",
    )
    assert nodes_and_tasks(two) == (2, 8)


def test_checkpoint_is_pinned_until_another_run(workplace: Path, configure: Configure, other_run: Path) -> None:
    config = configure(lm="other_run")
    assert config.stream is not None
    first = str(other_run / "checkpoints" / "step_00000010")
    assert config.stream.checkpoint == first
    make_run(other_run, ["model.d_model=64", "model.vocab_size=1000"], step=20)
    later = configure().stream
    assert later is not None
    assert later.checkpoint == str(other_run / "checkpoints" / "step_00000020")
    # A run that has left checkpoints of its own goes on with what it was begun on.
    run_dir = Path(config.run_dir)
    run_dir.parent.mkdir()
    create_run_dir(run_dir, config, command=["test"])
    assert configure().stream == later
    mark = run_dir / "checkpoints" / "step_00000003"
    mark.mkdir(parents=True)
    (mark / "state.json").write_text(json.dumps({}), encoding="utf-8")
    assert configure().stream == config.stream
    chosen = configure(f"stream.checkpoint={later.checkpoint}").stream
    assert chosen == replace(config.stream, checkpoint=later.checkpoint)
    shutil.rmtree(first)
    with pytest.raises(
        CheckpointError, match=r"was begun on the activations of .*step_00000010, which is no longer there"
    ):
        configure()


@pytest.mark.parametrize("crosscoder", [False, True])
def test_widths_of_a_transformers_models_modules_are_as_the_ranks_found_them(
    crosscoder: bool, configure: Configure, tmp_path: Path
) -> None:
    """They are not the model's, and a run that reads them goes on; with another number of latents it is another."""
    values = {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 1}
    (tmp_path / "hf").mkdir()
    text = json.dumps({**values, "max_position_embeddings": 32, "vocab_size": 1000})
    (tmp_path / "hf" / "config.json").write_text(text, encoding="utf-8")
    hooks = ["a.up", "b"]
    overrides = [f"sae.hooks=[{','.join(hooks)}]", f"sae.crosscoder={crosscoder}", "run_dir=mine"]
    config = configure(*overrides, lm="hf")
    assert config.sae is not None
    specs = specs_of(config.sae, dict(zip(hooks, (33, 8))))
    state = {"model": {spec.name: spec.shape for spec in specs}, "sae": {spec.name: asdict(spec) for spec in specs}}
    checkpoint = tmp_path / "mine" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    check_same_model(config)
    with pytest.raises(ConfigError, match="width: "):
        check_same_model(replace(config, sae=replace(config.sae, expansion=3, k=2)))
