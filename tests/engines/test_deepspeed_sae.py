"""SAEs under DeepSpeed: ZeRO over the replicas computes what the Megatron engine computes in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerscale.engines.config import EngineConfig
from steerscale.sae.config import VariantConfig
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from tests.sae.training import ARCHITECTURES, Trained, language_model, sae_config, trained
from tests.train.runs import train

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

Run = Callable[..., Trained]


@pytest.fixture(scope="module")
def run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("topk", EngineConfig(...), {"data": 2}) trains an SAE."""
    lm = language_model(german_data, tmp_path_factory.mktemp("lm") / "run")
    pool.run(train, lm, ranks=1)

    def make(architecture: str, engine: EngineConfig, parallel: dict[str, Any], **sae: Any) -> Trained:
        settings = {"architecture": architecture, **ARCHITECTURES[architecture], "sections": {"engine": engine}, **sae}
        config = sae_config(lm, german_data, tmp_path_factory.mktemp("sae") / "run", parallel=parallel, **settings)
        return trained(pool, config)

    return make


@pytest.mark.parametrize(
    ("architecture", "stage", "parallel"),
    [("topk", 0, {"tensor": 2}), ("jumprelu", 1, {"data": 2})],
    ids=["topk ZeRO-0 TP2", "jumprelu ZeRO-1 DP2"],
)
def test_parity_sae(run: Run, architecture: str, stage: int, parallel: dict[str, Any]) -> None:
    got = run(architecture, EngineConfig(name="deepspeed", zero_stage=stage), parallel)
    expected = run(architecture, EngineConfig(), {})
    assert got.consumed_hash == expected.consumed_hash
    assert got.active == expected.active
    np.testing.assert_allclose(got.losses, expected.losses, rtol=SAE.loss)
    np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=SAE.grad_norm)


def test_several_saes_have_engines_side_by_side(run: Run) -> None:
    """Each with ZeRO over the replicas; closing one leaves the others what they need to close."""
    variants = [VariantConfig(k=2), VariantConfig(architecture="relu", sparsity=0.02)]
    got, expected = (
        run("topk", engine, parallel, variants=variants)
        for engine, parallel in ((EngineConfig(name="deepspeed", zero_stage=1), {"data": 2}), (EngineConfig(), {}))
    )
    assert got.active == expected.active
    np.testing.assert_allclose(got.losses, expected.losses, rtol=SAE.loss)
