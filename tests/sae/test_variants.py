"""Sweeps on one stream, transcoders, crosscoders, bf16 and what else an SAE's settings change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from steerscale.checkpoint.store import load_state
from steerscale.data.config import DataConfig
from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError, TrainingError
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.config import SAEConfig, VariantConfig, specs_of
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.sae import build_sae_task
from tests.sae.training import ARCHITECTURES, HOOK, MODEL, Trained, sae_config, trained
from tests.train.runs import newest, prepare, train

STEPS = 12
ONE: dict[str, Any] = {}
TP2_DP2 = {"tensor": 2, "data": 2}
Run = Callable[..., Trained]


@pytest.fixture(scope="module")
def run(pool: RankPool, lm: Path, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run({"tensor": 2}, k=3) trains, once for each layout and settings."""
    done: dict[str, Trained] = {}

    def make(parallel: dict[str, Any], *, precision: str = "fp32", **settings: Any) -> Trained:
        key = f"{parallel} {precision} {settings}"
        if key not in done:
            sections = {
                "train": TrainConfig(steps=STEPS, eval_samples=2),
                "engine": EngineConfig(precision=precision),  # type: ignore[arg-type]
            }
            run_dir = tmp_path_factory.mktemp("runs") / "run"
            config = sae_config(lm, german_data, run_dir, parallel=parallel, sections=sections, **settings)
            done[key] = trained(pool, config)
        return done[key]

    return make


def _series(run: Trained, key: str) -> np.ndarray:
    return np.array([step[key] for step in run.metrics])


def _assert_close(got: Trained, expected: Trained) -> None:
    assert got.active == expected.active
    np.testing.assert_allclose(got.losses, expected.losses, rtol=SAE.loss)
    np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=SAE.grad_norm)


# --- several SAEs on one stream

VARIANTS = [
    VariantConfig(k=2),
    VariantConfig(k=6, width=64),
    VariantConfig(architecture="jumprelu", sparsity=0.005),
    VariantConfig(architecture="batch_topk"),
    VariantConfig(architecture="relu", sparsity=0.02, expansion=3),
]
SHARED = {"dead_after": 64, "aux_k": 8, "bandwidth": 0.05, "initial_threshold": 0.05}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_variant_is_the_sae_trained_alone(variant: VariantConfig, run: Run) -> None:
    together, alone = run(ONE, variants=VARIANTS, **SHARED), run(ONE, variants=[variant], **SHARED)
    name = f"{HOOK}@{variant.label}"
    assert together.active.keys() == {f"{HOOK}@{other.label}" for other in VARIANTS}
    assert together.active[name] == alone.active[name]
    for key in alone.metrics[0]:
        np.testing.assert_array_equal(_series(together, key), _series(alone, key), err_msg=key)
    for key, tensor in alone.tensors.items():
        np.testing.assert_array_equal(together.tensors[key], tensor, err_msg=str(key))


def test_variants_on_ranks_are_those_of_one_process(run: Run) -> None:
    _assert_close(run(TP2_DP2, variants=VARIANTS, **SHARED), run(ONE, variants=VARIANTS, **SHARED))


def test_variants_have_the_widths_they_ask_for(run: Run) -> None:
    run_ = run(ONE, variants=VARIANTS, **SHARED)
    widths = [run_.tensors["weight", f"{HOOK}@{variant.label}.W_enc"].shape[0] for variant in VARIANTS]
    assert widths == [128, 64, 128, 128, 3 * MODEL.d_model]


def test_sae_keeps_its_own_count_of_updates_when_others_are_named_first(
    pool: RankPool, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    """One whose loss is infinite takes no step; Adam's correction follows from how many there were."""
    fine, broken = VariantConfig(k=2), VariantConfig(architecture="relu", sparsity=3e38)
    for steps, variants in ((4, [fine, broken]), (6, [broken, fine])):
        sections = {"train": TrainConfig(steps=steps, eval_samples=1, max_skipped_in_row=9)}
        config = sae_config(lm, german_data, tmp_path / "run", sections=sections, variants=variants)
        trained(pool, config)
    state, _ = load_state(newest(tmp_path / "run"))
    counts = dict(zip(state["model"], state["applied_steps"]))
    assert counts == {f"{HOOK}@{fine.label}": 6, f"{HOOK}@{broken.label}": 0}


def give_up(config: RunConfig) -> str:
    """What a run says that cannot go on. For `RankPool.run`."""
    with pytest.raises(TrainingError) as caught:
        train(prepare(config))
    return str(caught.value)


def test_run_that_gives_up_names_vectors(pool: RankPool, lm: Path, german_data: Path, tmp_path: Path) -> None:
    """data.skip counts sequences, it is no remedy here; what was left out by it is not among the vectors either."""
    sections = {
        "train": TrainConfig(steps=4, max_skipped_in_row=2),
        "data": DataConfig(path=str(german_data), skip=[[0, 50]]),
    }
    config = sae_config(lm, german_data, tmp_path / "run", sections=sections, architecture="relu", sparsity=3e38)
    (text,) = pool.run(give_up, config, ranks=1)
    assert "on samples 0 to 127: lower optim.lr" in text
    assert "data.skip" not in text


# --- what is read, and what is reconstructed

EVERY: dict[str, Any] = {
    "variants": [VariantConfig(architecture=name) for name in ARCHITECTURES],  # type: ignore[arg-type]
    **ARCHITECTURES["matryoshka"],
    **ARCHITECTURES["jumprelu"],
}
"""Every architecture on one stream."""
TRANSCODER = {"hooks": ["blocks.1.hook_resid_pre"], "targets": ["blocks.1.hook_mlp_out"]}
CROSSCODER = {"hooks": ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"], "crosscoder": True}


@pytest.mark.parametrize("kind", [TRANSCODER, CROSSCODER], ids=["transcoder", "crosscoder"])
def test_transcoder_and_crosscoder_on_ranks(kind: dict[str, Any], run: Run) -> None:
    settings = {**kind, **EVERY}
    _assert_close(run(TP2_DP2, **settings), run(ONE, **settings))


def test_transcoder_backwards_through_a_transformers_model_is_refused(german_data: Path, tmp_path: Path) -> None:
    """At the start, when the order of its modules is known, and not by the first evaluation."""
    shape = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=1000, n_positions=32)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    hooks, targets = ["transformer.h.1"], ["transformer.h.1.mlp"]  # a block's output comes after its MLP's
    config = sae_config(tmp_path, german_data, tmp_path / "run", hooks=hooks, targets=targets)
    assert config.stream is not None
    config = replace(config, stream=replace(config.stream, lm_kind="transformers"))
    with (
        initialize(ParallelLayout()) as context,
        pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlp comes before transformer\.h\.1 in the model"),
    ):
        build_sae_task(config, context)


def test_transcoder_reconstructs_its_target(run: Run) -> None:
    transcoder = run(ONE, **TRANSCODER, **ARCHITECTURES["topk"])
    # Two hook points as well, and so the same vectors.
    both = run(ONE, hooks=[*TRANSCODER["hooks"], *TRANSCODER["targets"]], **ARCHITECTURES["topk"])
    (name,), (target,) = transcoder.active, TRANSCODER["targets"]
    assert name == "blocks.1.hook_resid_pre"
    # Mean and scale are those of what is reconstructed.
    for part in ("mean", "output_scale"):
        np.testing.assert_array_equal(
            transcoder.tensors["state", f"{name}.{part}"], both.tensors["state", f"{target}.{part}"]
        )
    assert transcoder.tensors["state", f"{name}.input_scale"] != transcoder.tensors["state", f"{name}.output_scale"]
    assert transcoder.metrics[-1][f"{name}/fvu"] < 0.97 * transcoder.metrics[0][f"{name}/fvu"]


def test_crosscoder_spans_its_hooks(run: Run) -> None:
    run_ = run(ONE, **CROSSCODER, **ARCHITECTURES["topk"])
    (name,) = run_.active
    assert name == "blocks.0.hook_resid_post+blocks.1.hook_mlp_out"
    assert run_.tensors["weight", f"{name}.W_dec"].shape == (128, 2 * MODEL.d_model)
    assert run_.metrics[-1][f"{name}/fvu"] < run_.metrics[0][f"{name}/fvu"]


# --- bf16

BF16_LOSS = 4e-2
"""Relative, against float32 or another layout, over 12 steps. Observed at most 1.5e-2, where other latents are selected."""


@pytest.mark.parametrize("parallel", [ONE, TP2_DP2], ids=str)
def test_bf16_selects_exactly_k(parallel: dict[str, Any], run: Run) -> None:
    active = run(parallel, precision="bf16", **EVERY).active
    for step in active[f"{HOOK}@architecture=topk"]:
        assert (np.bincount([row for row, _ in step], minlength=64) == 4).all()
    for name in ("batch_topk", "matryoshka"):
        assert all(len(step) == 4 * 64 for step in active[f"{HOOK}@architecture={name}"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_near_float32(architecture: str, run: Run) -> None:
    runs = [run(ONE, **EVERY), run(ONE, precision="bf16", **EVERY), run(TP2_DP2, precision="bf16", **EVERY)]
    exact, rounded, on_ranks = (_series(one, f"{HOOK}@architecture={architecture}/loss") for one in runs)
    assert (exact != rounded).any()
    np.testing.assert_allclose(rounded, exact, rtol=BF16_LOSS)
    np.testing.assert_allclose(on_ranks, rounded, rtol=BF16_LOSS)


# --- settings

SETTINGS: dict[str, dict[str, Any]] = {
    "b_dec not subtracted": {"subtract_b_dec": False},
    "free norms": {"architecture": "relu", "sparsity": 0.02, "unit_norm_decoder": False},
    "untied": {"tied_init": False},
    "no scaling": {"normalize": "none"},
    "width": {"normalize": "width"},
    "mean": {"b_dec_init": "mean"},
    "zero": {"b_dec_init": "zero"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_on_ranks(name: str, run: Run) -> None:
    _assert_close(run(TP2_DP2, **SETTINGS[name]), run(ONE, **SETTINGS[name]))


def test_activations_are_scaled(run: Run) -> None:
    none, unit, width = (run(ONE, normalize=kind) for kind in ("none", "unit", "width"))
    scale = {key: run_.tensors["state", f"{HOOK}.input_scale"] for key, run_ in zip("nuw", (none, unit, width))}
    assert scale["n"] == 1
    assert scale["w"] == pytest.approx(scale["u"] * MODEL.d_model**0.5, rel=1e-6)
    # The first step's reconstruction is the same, in another scale.
    for run_, factor in ((unit, scale["u"]), (width, scale["w"])):
        first, unscaled = run_.metrics[0], none.metrics[0]
        assert first[f"{HOOK}/mse"] == pytest.approx(unscaled[f"{HOOK}/mse"] * factor**2, rel=1e-4)
        assert first[f"{HOOK}/fvu"] == pytest.approx(unscaled[f"{HOOK}/fvu"], rel=1e-4)


def test_decoder_keeps_its_norms(run: Run) -> None:
    def norms(**settings: Any) -> np.ndarray:
        return np.linalg.norm(run(ONE, **settings).tensors["weight", f"{HOOK}.W_dec"], axis=1)

    np.testing.assert_allclose(norms(), 1, rtol=1e-6)
    assert np.ptp(norms(**SETTINGS["free norms"])) > 1e-3


def test_widths_that_do_not_fit_are_refused() -> None:
    config = SAEConfig(hooks=[HOOK], k=64, variants=[VariantConfig(expansion=1), VariantConfig(expansion=4)])
    with pytest.raises(ConfigError, match=r"sae\.k=64 must be at most the number of latents 32"):
        specs_of(config, {HOOK: 32})
