from pathlib import Path

import pytest

import launch.train
from launch.caution import warnings_about
from launch.check import check_config
from launch.compose import compose_config
from steerscale.errors import ConfigError
from steerscale.train.config import RunConfig
from tests.launch.conftest import make_run

SHAPE = ["model.vocab_size=1000", "parallel.global_batch_size=8"]


@pytest.fixture
def run_dir(tmp_path: Path, german_data: Path) -> Path:
    """A run of the demo model that stands at step 10 of 100."""
    return make_run(tmp_path / "run", [f"data.path='{german_data}'", *SHAPE])


def config_of(run_dir: Path, data: Path, *overrides: str) -> RunConfig:
    needed = [f"run_dir='{run_dir}'", f"data.path='{data}'", "train.steps=100", *SHAPE]
    return check_config(compose_config([*needed, *overrides]))


def test_same_run_and_other_layouts_go_on_without_a_word(run_dir: Path, german_data: Path) -> None:
    for overrides in (
        [],
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2"],
        ["parallel.micro_batch_size=4"],
        ["parallel.global_batch_size=null", "parallel.micro_batch_size=2", "parallel.gradient_accumulation_steps=4"],
        ["train.steps=200", "checkpoint.interval=7", "data.num_prefetch=0", "optim.lr=1e-3"],
    ):
        assert warnings_about(config_of(run_dir, german_data, *overrides)) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=7", ("seed=7, before it was seed=1234", "some may come twice")),
        ("data.skip=[[3,4]]", ("data.skip=[[3, 4]], before it was data.skip=[]",)),
        ("data.random_offset=false", ("data.random_offset=false, before it was data.random_offset=true",)),
        ("data.mask_document_end=true", ("data.mask_document_end=true, before it was", "=false")),
        ("data.reset_at_document_end=true", ("data.reset_at_document_end=true, before it was",)),
        (
            "parallel.global_batch_size=16",
            ("parallel.global_batch_size=16, before it was parallel.global_batch_size=8", "grouped into other steps"),
        ),
        (
            "train.ramp_up={start: 2, increment: 2, samples: 8}",
            ("train.ramp_up={start: 2, increment: 2, samples: 8}, before it was train.ramp_up=null",),
        ),
        ("train.steps=10", ("stands at step 10 already, train.steps=10", "nothing is left to do")),
    ],
)
def test_warns_of_what_changes_the_meaning_of_going_on(
    override: str, parts: tuple[str, ...], run_dir: Path, german_data: Path
) -> None:
    (warning,) = warnings_about(config_of(run_dir, german_data, override))
    for part in (str(run_dir), "step 10", *parts):
        assert part in warning


def test_warns_of_other_datasets(run_dir: Path, datasets: dict[str, Path]) -> None:
    good, other = datasets["good"], datasets["no_valid"]
    warnings = warnings_about(config_of(run_dir, other, "train.eval_interval=0"))
    assert len(warnings) == 1
    assert f"data.path={other}, before it was data.path={good}" in warnings[0]
    overrides = ["data.path=null", f"data.blend={{{good}:1,{other}:3}}", "train.eval_interval=0"]
    (warning,) = warnings_about(config_of(run_dir, good, *overrides))
    assert f"data.blend={{{good}: 1.0, {other}: 3.0}}, before it was data.path={good}" in warning


def test_another_model_is_refused_but_dropout_is_free(run_dir: Path, german_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers was 4, is 2; model\.bias was false, is true"):
        config_of(run_dir, german_data, "model.num_layers=2", "model.bias=true")
    assert warnings_about(config_of(run_dir, german_data, "model.dropout=0.1", "model.init_std=0.01")) == []


def test_without_checkpoints_there_is_nothing_to_resume(run_dir: Path, german_data: Path) -> None:
    state = run_dir / "checkpoints" / "step_00000010" / "state.json"
    text = state.read_text(encoding="utf-8")
    for content in ("{", "[1]", "{}"):  # damaged ones: the workers name them and use the one before
        state.write_text(content, encoding="utf-8")
        config_of(run_dir, german_data, "model.num_layers=2")
    state.write_text(text, encoding="utf-8")
    (run_dir / "config.yaml").write_text("{", encoding="utf-8")
    (warning,) = warnings_about(config_of(run_dir, german_data))
    assert "config.yaml cannot be read" in warning
    state.unlink()
    assert warnings_about(config_of(run_dir, german_data, "seed=3", "model.num_layers=2")) == []


def test_the_newest_checkpoint_counts(run_dir: Path, german_data: Path) -> None:
    make_run(run_dir, ["model.vocab_size=1000", "model.num_layers=2"], step=20)
    with pytest.raises(ConfigError, match=r"model\.num_layers was 2, is 4"):
        config_of(run_dir, german_data)


def test_launch_prints_warnings_before_it_starts(
    run_dir: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.local.run_local", lambda config, **options: 0)
    arguments = [f"run_dir={run_dir}", f"data.path={german_data}", "train.steps=100", *SHAPE, "seed=7"]
    assert launch.train.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"resuming: {run_dir}\n"
    assert printed.err.startswith(f"warning: run_dir={run_dir} goes on from step 10 with seed=7")
    assert printed.err.count("\n") == 1
    # The changed configuration is now the run's own; the earlier one is kept beside it.
    assert (run_dir / "config.0.yaml").is_file()
    assert launch.train.main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.vocab_size=2000"], "model.vocab_size=2000 is larger than the dataset's vocabulary of 1000"),
        (["optim.schedule=constant", "optim.decay_steps=5"], "optim.decay_steps=5 has no effect"),
        (["train.ramp_up={start:4,increment:4,samples:1000}"], "train.ramp_up.samples=1,000 is more than the 400"),
        (["model.d_model=65536", "model.num_layers=64"], "has no GPU"),
    ],
)
def test_warns_of_what_is_hardly_meant(
    overrides: list[str], part: str, tmp_path: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.caution.has_gpu", lambda: False)
    (warning,) = warnings_about(config_of(tmp_path / "new", german_data, *overrides))
    assert part.replace("has no GPU", "no GPU") in warning


def test_says_that_nothing_will_be_evaluated(tmp_path: Path, datasets: dict[str, Path]) -> None:
    (warning,) = warnings_about(config_of(tmp_path / "new", datasets["no_valid"]))
    assert "no split 'valid': nothing will be evaluated" in warning
