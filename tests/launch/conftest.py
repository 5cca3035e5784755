import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import launch.train
from launch.train import main

Refusal = Callable[..., str]


def listing(directory: Path) -> list[tuple[str, int]]:
    """Everything below a directory with its time of change."""
    return sorted((str(path), path.lstat().st_mtime_ns) for path in directory.rglob("*"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of a test. Nothing in it may start a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.train, "launch", lambda config: pytest.fail(f"would have started {config.run_dir}"))
    return tmp_path


@pytest.fixture
def refusal(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Call `launch.train.main`, which has to refuse: one line on stderr, status 2, nothing written. Returns the line."""

    def refuse(*argv: str) -> str:
        before = listing(workplace)
        status = main(argv)
        out, err = capsys.readouterr()
        assert listing(workplace) == before
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "error:" not in err.removeprefix("error: ")
        return err.removeprefix("error: ").strip()

    return refuse


@pytest.fixture(scope="session")
def datasets(german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prepared dataset `good` (1000 tokens of vocabulary), and damaged ones."""
    root = tmp_path_factory.mktemp("datasets")

    def variant(name: str) -> Path:
        return Path(shutil.copytree(german_data, root / name))

    def edit(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = variant(name) / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    with (variant("cut") / "train.bin").open("r+b") as file:
        file.truncate(100)
    with (variant("header") / "train.idx").open("r+b") as file:
        file.write(b"XXXXXXXXX")
    (variant("no_index") / "valid.idx").unlink()
    (variant("no_manifest") / "manifest.json").unlink()
    (variant("garbage") / "manifest.json").write_bytes(b"\x00\xff not json")
    (variant("list") / "manifest.json").write_text("[1]", encoding="utf-8")
    edit("newer", lambda m: m.update(format_version=2))
    edit("strange", lambda m: m.update(colour="red"))
    edit("other", lambda m: m["tokenizer"].update(hash="0" * 64))
    edit("no_train", lambda m: m["splits"].pop("train"))
    edit("no_valid", lambda m: m["splits"].pop("valid"))
    return {"good": german_data, **{path.name: path for path in root.iterdir()}}


@pytest.fixture
def other_run(workplace: Path) -> Path:
    """A run directory with a checkpoint of a demo model that has d_model=64, from a step 10."""
    return make_run(workplace / "other_run", ["model.d_model=64", "model.vocab_size=1000", "seed=7"])


@pytest.fixture
def learned(workplace: Path) -> Path:
    """The same with learned positions."""
    return make_run(workplace / "learned", ["model.d_model=64", "model.vocab_size=1000", "model.position=learned"])


@pytest.fixture
def untrained(workplace: Path) -> Path:
    """A run directory without a checkpoint."""
    run_dir = make_run(workplace / "untrained", ["model.d_model=64", "model.vocab_size=1000"])
    shutil.rmtree(run_dir / "checkpoints")
    return run_dir


@pytest.fixture
def sae_run(workplace: Path, other_run: Path) -> Path:
    """A run directory with a checkpoint of a TopK SAE on layer 1 of `other_run`."""
    hook = "blocks.1.hook_resid_post"
    shape = {"architecture": "topk", "inputs": [hook], "outputs": [hook], "width": 1024}
    checkpoint = workplace / "sae_run" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    state = {"progress": {"step": 10}, "model": {hook: shape}}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (workplace / "sae_run" / "config.yaml").write_text("{}", encoding="utf-8")
    return workplace / "sae_run"


def make_run(run_dir: Path, overrides: list[str], *, step: int = 10) -> Path:
    """What a run of `overrides` leaves behind, without running it."""
    from dataclasses import asdict

    from launch.compose import compose_config
    from steerscale.checkpoint.integrity import FORMAT_VERSION, describe_file
    from steerscale.config import dump_yaml, from_mapping
    from steerscale.train.config import RunConfig

    config = from_mapping(
        RunConfig, compose_config([f"run_dir='{run_dir}'", "data.path=/none", "train.steps=100", *overrides])
    )
    checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    state = {"progress": {"step": step}, "model": asdict(config.model)}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "index.json").write_text("{}", encoding="utf-8")
    files = {path.name: describe_file(path) for path in sorted(checkpoint.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return run_dir
