from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import fit
from launch.check import check_config
from launch.compose import compose_config
from launch.fit import does_it_fit, local_device, refuse_oversized
from launch.train import main
from steerscale.activations.config import StreamConfig
from steerscale.errors import ConfigError
from steerscale.planning.machine import machine_of
from steerscale.sae.config import SAEConfig
from steerscale.train.config import RunConfig

Configure = Callable[..., RunConfig]
BIG = ["model=6.7b", "model.vocab_size=51200", "engine.precision=bf16", "parallel.global_batch_size=64"]


def dry(*overrides: str) -> RunConfig:
    """A checked configuration of 6.7B."""
    return check_config(
        compose_config(["launcher=dry_run", "train.steps=10", "optim.warmup_steps=0", *BIG, *overrides])
    )


@pytest.fixture
def local(german_data: Path, tmp_path: Path) -> Configure:
    """A checked configuration that would be started here."""

    def configure(*overrides: str) -> RunConfig:
        needed = [f"data.path={german_data}", f"run_dir={tmp_path / 'run'}", "train.steps=10", "optim.warmup_steps=0"]
        return check_config(compose_config([*needed, *overrides]))

    return configure


def driver(directory: Path, *models: str) -> Path:
    """What the driver shows of these GPUs."""
    for number, model in enumerate(models):
        place = directory / f"0000:0{number}:00.0"
        place.mkdir(parents=True)
        text = f"Model: \t\t {model}\nIRQ:   \t\t 55\nGPU UUID: \t GPU-1\n"
        (place / "information").write_text(text, encoding="utf-8")
    return directory


def test_local_device_is_what_the_driver_says(tmp_path: Path) -> None:
    assert local_device(tmp_path / "none") is None
    assert local_device(driver(tmp_path / "two", *["NVIDIA H100 80GB HBM3"] * 2)) == "NVIDIA H100 80GB HBM3"
    assert local_device(driver(tmp_path / "mixed", "NVIDIA H200", "NVIDIA H100 PCIe")) is None
    assert local_device(driver(tmp_path / "unknown", "NVIDIA GeForce RTX 4090")) is None


def test_does_it_fit_tells_memory_and_time() -> None:
    machine = machine_of("a100-40gb")
    small = does_it_fit(dry("parallel.data=16"), machine=machine)
    assert small is not None
    assert not small.fits
    split = does_it_fit(dry("parallel.tensor=4", "parallel.data=4", "parallel.micro_batch_size=2"), machine=machine)
    assert split is not None
    assert split.fits
    assert split.seconds_per_iteration is not None
    assert 0.5 < split.seconds_per_iteration < 5
    whole = does_it_fit(dry("parallel.tensor=4", "engine.precision=fp32"), machine=machine)
    assert whole is not None
    assert whole.seconds_per_iteration is None


def test_the_device_is_the_clusters_or_unknown() -> None:
    verdict = does_it_fit(dry("cluster=alpha", "parallel.tensor=8"))
    assert verdict is not None
    assert (verdict.fit.device_gib, verdict.machine.inter_node_gb_per_second) == (40, 6.25)
    assert does_it_fit(dry("cluster=generic", "parallel.tensor=8")) is None
    assert does_it_fit(dry("parallel.tensor=8")) is None


def test_sparse_autoencoders_are_not_planned() -> None:
    config = dry("parallel.tensor=8")
    sae = SAEConfig(hooks=["blocks.2.hook_resid_post"], architecture="topk", width=4096, k=32)
    training_saes = replace(config, sae=sae, stream=StreamConfig(lm="runs/gpt"))
    machine = machine_of("a100-40gb")
    assert does_it_fit(config, machine=machine) is not None
    assert does_it_fit(training_saes, machine=machine) is None


def test_a_run_that_cannot_fit_is_refused_with_parts_and_advice(
    local: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local(*BIG, "parallel.data=4")
    refuse_oversized(config)  # no GPU: nothing to hold it against
    monkeypatch.setattr(fit, "NVIDIA", driver(tmp_path / "gpus", *["NVIDIA A100-SXM4-40GB"] * 4))
    with pytest.raises(ConfigError) as error:
        refuse_oversized(config)
    text = str(error.value)
    assert "TP1 PP1 DP4 MBS1 GAS16 with engine.recompute=none does not fit a100-sxm-40gb of 40 GiB" in text
    assert "gradients 24.8" in text
    assert "What would fit: " in text
    assert "parallel.tensor=" in text
    assert "launcher.force=true" in text
    refuse_oversized(local(*BIG, "parallel.data=4", "launcher.force=true"))
    refuse_oversized(local("parallel.data=4"))


def test_advice_where_no_layout_fits(local: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "local_device", lambda: "NVIDIA A100-SXM4-40GB")
    with pytest.raises(ConfigError, match="No layout of this model fits 1 of them"):
        refuse_oversized(local(*BIG))


@pytest.mark.parametrize(
    "more", [["parallel.data=4", "engine.recompute=full"], ["parallel.data=8", "engine=deepspeed"]]
)
def test_the_advice_can_be_followed(local: Configure, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    monkeypatch.setattr(fit, "local_device", lambda: "NVIDIA A100-SXM4-40GB")
    overrides = [*BIG, *more]
    with pytest.raises(ConfigError) as error:
        refuse_oversized(local(*overrides))
    for advice in ("What would fit: ", "the fastest: "):
        changes = str(error.value).split(advice)[1].split(";")[0].split()
        refuse_oversized(local(*overrides, *changes))


def test_the_command_refuses_before_anything_is_written(
    german_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit, "local_device", lambda: "NVIDIA A100-SXM4-40GB")
    status = main(
        [f"data.path={german_data}", f"run_dir={tmp_path / 'run'}", "train.steps=10", "optim.warmup_steps=0", *BIG]
    )
    assert status == 2
    assert "GiB too much" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
