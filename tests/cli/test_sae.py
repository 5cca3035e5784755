from dataclasses import replace
from pathlib import Path

import pytest

from steerscale.activations.cost import stream_cost
from steerscale.cli import main
from steerscale.config import dump_yaml
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.planning.flops import forward_flops_per_token

GEMMA_2_9B = ModelConfig(
    num_layers=42,
    d_model=3584,
    num_heads=16,
    num_kv_groups=8,
    d_head=256,
    d_ff=14336,
    seq_len=1024,
    activation="swiglu",
)  # its widths, in our terms: Gemma 2 report (arXiv 2408.00118), table 1


def test_cost_of_gemma_scopes_storage_is_the_published_one() -> None:
    """8 billion tokens at one site of the 9B model: about 100 TiB in fp32 (Gemma Scope, arXiv 2408.05147)."""
    cost = stream_cost(GEMMA_2_9B, ["blocks.20.hook_resid_post"], tokens=8 * 10**9, price_per_tb=20.0)
    assert cost.stored_bytes == 8 * 10**9 * 3584 * 4
    assert 100 < cost.stored_bytes / 2**40 < 110
    assert cost.price == pytest.approx(114.688 * 20)


def test_cost_counts_each_hook_and_the_blocks_to_the_last_one() -> None:
    whole = forward_flops_per_token(GEMMA_2_9B, vocab_size=0).total
    hooks = ["blocks.3.hook_resid_post", "blocks.20.hook_mlp_out"]
    cost = stream_cost(GEMMA_2_9B, hooks, tokens=1000, dtype="bf16", price_per_tb=1.0)
    assert (cost.layers, cost.bytes_per_hook, cost.stored_bytes) == (21, 1000 * 3584 * 2, 2 * 1000 * 3584 * 2)
    assert cost.price == 2 * cost.price_per_hook
    assert cost.forward_flops_per_token == whole // 2
    assert cost.forward_flops == 1000 * cost.forward_flops_per_token
    assert stream_cost(GEMMA_2_9B, ["blocks.20.hook_resid_pre"], tokens=1).layers == 20
    assert stream_cost(replace(GEMMA_2_9B, seq_len=8192), hooks, tokens=1).forward_flops > cost.forward_flops_per_token


def test_cost_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.2\.hook_mlp_out'"):
        stream_cost(GEMMA_2_9B, ["block.2.hook_mlp_out"], tokens=1)
    with pytest.raises(ConfigError, match="tokens must be positive, got 0"):
        stream_cost(GEMMA_2_9B, ["blocks.2.hook_mlp_out"], tokens=0)


def test_sae_cost_prints_a_line_for_each_hook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gemma.yaml").write_text(dump_yaml(GEMMA_2_9B))
    hooks = ["blocks.9.hook_resid_post", "blocks.20.hook_resid_post"]
    args = ["--model", str(tmp_path / "gemma.yaml"), "--tokens", "8e9", "--price-per-tb", "20", "--hooks", *hooks]
    assert main(["sae", "cost", *args]) == 0
    head, *lines, streamed = capsys.readouterr().out.splitlines()
    assert head.split() == ["stored", "TB", "TiB", "price"]
    assert [line.split() for line in lines] == [
        ["blocks.9.hook_resid_post", "114.7", "104.3", "2,294"],
        ["blocks.20.hook_resid_post", "114.7", "104.3", "2,294"],
        ["all", "229.4", "208.6", "4,588"],
    ]
    assert "21 of 42 blocks" in streamed


def test_sae_cost_takes_a_size_and_refuses_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ["--hooks", "blocks.5.hook_mlp_out", "--tokens", "1e6"]
    assert main(["sae", "cost", "--model", "125m", *hook]) == 0
    assert "price" not in capsys.readouterr().out
    assert main(["sae", "cost", "--model", "126m", *hook]) == 2
    assert "126m.yaml does not exist; name a file or directory, or a size: 1.3b, 125m" in capsys.readouterr().err
