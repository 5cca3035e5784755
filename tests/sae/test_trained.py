"""SAEs trained here, read from checkpoints that tensor ranks wrote: the same reconstructions as the ranks'."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from steerscale.checkpoint.fragments import Fragment, write_fragments, write_index
from steerscale.checkpoint.integrity import STATE
from steerscale.cli import main
from steerscale.errors import CheckpointError, ConfigError
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.sae.formats import read_sae
from steerscale.sae.state import state_fragments
from steerscale.sae.trained import read_trained, trained_names
from steerscale.testing.ranks import RankPool

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

WIDTHS = {"blocks.1.hook_resid_post": 8, "blocks.1.hook_mlp_out": 6}
HOOK, TARGET = WIDTHS


def _vectors() -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(4))


def _fill(sae: SparseAutoencoder) -> None:
    """Random weights, equal on every layout, scales that are not 1, and what stands for a threshold."""
    generator = torch.Generator().manual_seed(9)
    rank, size = sae.context.at.tensor, sae.context.layout.tensor
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            rows = len(parameter) * (1 if name == "b_dec" else size)
            whole = torch.randn(rows, *parameter.shape[1:], generator=generator) * 0.4
            whole = whole.abs() if name == "threshold" else whole
            parameter.copy_(whole if name == "b_dec" else whole.chunk(size)[rank])
            if sae.spec.config.ema:
                sae.averages[name] = parameter / 2
    sae.scales.input.fill_(0.7)
    sae.scales.output.fill_(1.3 if sae.spec.is_transcoder else 0.7)
    if "batch_threshold" in sae.scalar_state:
        sae.scalar_state["batch_threshold"].fill_(0.35)


def write_checkpoint(config: SAEConfig, directory: str) -> torch.Tensor:
    """This rank's part of a checkpoint; returns what the ranks reconstruct."""
    with initialize(ParallelLayout(tensor=2)) as context:
        (spec,) = specs_of(config, WIDTHS)
        sae = ARCHITECTURES[config.architecture](spec, context).eval()
        _fill(sae)
        at = context.at.tensor
        weights = [
            Fragment(
                kind="weight",
                name=shard.name,
                whole_shape=tuple(shard.whole_shape(tensor.shape, size=2)),
                offset=box.offset,
                shape=box.shape,
                start=0,
                data=tensor.detach().reshape(-1),
            )
            for shard, tensor in sae.shards()
            if shard.dim is not None or at == 0
            for box in shard.boxes(tensor.shape, rank=at, size=2)
        ]
        entries = write_fragments([*weights, *state_fragments(sae)], Path(directory) / f"{at}.safetensors")
        (Path(directory) / f"{at}.json").write_text(json.dumps(entries))
        if at == 0:
            (Path(directory) / STATE).write_text(json.dumps({"sae": {spec.name: asdict(spec)}}))
        with torch.no_grad():
            return sae.reconstruct(_vectors())


def _checkpoint(pool: RankPool, directory: Path, **changes: object) -> torch.Tensor:
    config = SAEConfig(**{"hooks": [HOOK], "width": 24, "k": 4, **changes})  # type: ignore[arg-type]
    reconstruction, _ = pool.run(write_checkpoint, config, str(directory), ranks=2)
    entries = [entry for rank in range(2) for entry in json.loads((directory / f"{rank}.json").read_text())]
    write_index(entries, directory)
    return reconstruction


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", [None, TARGET], ids=["sae", "transcoder"])
def test_a_trained_sae_reconstructs_as_its_ranks_do(
    pool: RankPool, tmp_path: Path, architecture: str, target: str | None
) -> None:
    expected = _checkpoint(pool, tmp_path, architecture=architecture, targets=target and [target])
    sae = read_trained(tmp_path)
    torch.testing.assert_close(sae.reconstruct(_vectors()), expected, **TOLERANCE)
    assert 0 < (sae.encode(_vectors()) > 0).double().mean() < 0.9
    assert (sae.architecture, sae.hook, sae.hook_out) == (architecture, HOOK, target)
    part, rest = read_trained(tmp_path, latents=slice(0, 10)), read_trained(tmp_path, latents=slice(10, None))
    assert torch.equal(torch.cat([part.W_dec, rest.W_dec]), sae.W_dec)
    assert (rest.first_latent, rest.total_latents) == (10, 24)


def test_averages_are_preferred_to_the_last_weights(pool: RankPool, tmp_path: Path) -> None:
    _checkpoint(pool, tmp_path / ".", architecture="relu", ema=0.9)
    averaged = read_trained(tmp_path).W_dec
    other = tmp_path / "last"
    other.mkdir()
    _checkpoint(pool, other, architecture="relu")
    torch.testing.assert_close(averaged, read_trained(other).W_dec / 2)


def test_convert_writes_a_trained_sae(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    expected = _checkpoint(pool, checkpoint, architecture="batch_topk")
    assert main(["sae", "convert", str(checkpoint), str(tmp_path / "out"), "--model", "ours", "--unit-norm"]) == 0
    assert "batch_topk, 24 latents, saelens" in capsys.readouterr().out
    sae = read_sae(tmp_path / "out")
    torch.testing.assert_close(sae.reconstruct(_vectors()), expected, **TOLERANCE)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert (sae.model, sae.hook, sae.k) == ("ours", HOOK, 4)
    assert main(["sae", "convert", str(tmp_path / "out"), str(tmp_path / "npz"), "--format", "gemma_scope"]) == 0
    torch.testing.assert_close(read_sae(tmp_path / "npz").reconstruct(_vectors()), expected, **TOLERANCE)
    assert main(["sae", "convert", str(tmp_path / "out"), str(tmp_path / "x"), "--format", "sparsify"]) == 2
    assert "the sparsify format cannot hold this batch_topk SAE" in capsys.readouterr().err
    assert main(["sae", "convert", str(tmp_path / "out"), str(tmp_path / "x"), "--sae", "other"]) == 2
    assert "is no run or checkpoint" in capsys.readouterr().err


def test_names_that_are_not_there(tmp_path: Path) -> None:
    write_index([], tmp_path)
    (tmp_path / STATE).write_text(json.dumps({"sae": {"a": {}, "b": {}}}))
    assert trained_names(tmp_path) == ["a", "b"]
    with pytest.raises(ConfigError, match="holds several SAEs: name one of a, b"):
        read_trained(tmp_path)
    with pytest.raises(ConfigError, match="holds no SAE 'c', only a, b"):
        read_trained(tmp_path, "c")
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match="holds no SAEs: it is of another kind of run"):
        trained_names(tmp_path)
