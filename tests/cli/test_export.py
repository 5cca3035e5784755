import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from steerscale.checkpoint.fragments import write_fragments, write_index
from steerscale.checkpoint.store import STATE
from steerscale.cli import main
from steerscale.config import from_mapping
from steerscale.models.config import ModelConfig
from steerscale.models.hf.families import config_from_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from tests.models.gpts import LLAMA, build_engine, infer

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint directory, beside the logits of its model."""
    directory = tmp_path / "step_00000001"
    directory.mkdir()
    with initialize(ParallelLayout()) as context:
        engine = build_engine(LLAMA, context)
        write_index(write_fragments(engine.fragments(), directory / "rank_0.safetensors"), directory)
        (directory / STATE).write_text(json.dumps({"model": asdict(LLAMA)}))
        logits = infer(engine.unwrapped, TOKENS)
        assert logits is not None
        np.save(tmp_path / "logits.npy", logits.numpy())
    return directory


def test_export_of_a_checkpoint_gives_transformers_the_same_logits(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf"), "--eos-token-id", "7"]) == 0
    assert f"-> {tmp_path / 'hf'}: 27 parameters in float32" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = model(TOKENS).logits.numpy()
    np.testing.assert_allclose(logits, np.load(tmp_path / "logits.npy"), atol=1e-5)
    assert model.config.eos_token_id == 7


def test_export_in_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_export_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "hf")]) == 2
    assert "holds no whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_export_refuses_what_it_should_not_write(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for token in ("-1", "61"):
        assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf"), "--eos-token-id", token]) == 2
        assert f"0 to 60, got {token}" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf")]) == 0
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf")]) == 2
    assert "hf exists already: choose another output directory\n" in capsys.readouterr().err
    (checkpoint / STATE).write_text(json.dumps({"model": {"blocks.2.hook_resid_post": {"width": 64}}}))
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "other")]) == 2
    assert "is of no GPT" in capsys.readouterr().err


def test_export_of_a_checkpoint_that_lacks_a_parameter_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((checkpoint / "index.json").read_text())
    kept = [entry for entry in index if entry["name"] != "decoder.layers.2.mlp.linear_fc1.weight"]
    (checkpoint / "index.json").write_text(json.dumps(kept))
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf")]) == 2
    assert "no weight of parameter 'decoder.layers.2.mlp.linear_fc1.weight'" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_reader_that_has_gone_is_no_traceback(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "hf")]) == 0
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; from steerscale.cli import main; sys.exit(main(['import', {str(tmp_path / 'hf')!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_import_prints_a_model_configuration(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(checkpoint), "-o", str(tmp_path / "hf")])
    capsys.readouterr()
    assert main(["import", str(tmp_path / "hf")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert from_mapping(ModelConfig, printed) == config_from_hf(tmp_path / "hf")
    assert printed["num_kv_groups"] == 2
