"""Superposition: the toys against what is known of them, the measures on made-up cases, and the whole at a tiny size."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from launch.experiment import main
from steerscale.experiments.superposition import draw_hidden
from steerscale.experiments.superposition_config import DictionaryConfig, SteeringConfig, SuperpositionConfig
from steerscale.experiments.superposition_sae import (
    latents,
    match,
    mean_differences,
    probe_directions,
    train_sae,
    variance_explained,
)
from steerscale.experiments.superposition_steering import (
    error,
    make_samples,
    measure_steering,
    side_effect,
    steered,
    task_of,
)
from steerscale.experiments.superposition_toy import (
    REPRESENTED,
    Toys,
    draw_features,
    interference,
    lengths,
    train_toys,
)
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout

TINY = [
    "name=tiny", "seeds=2", "sweep.steps=50", "sweep.active=[1,0.1]", "phase.points=3", "phase.steps=50",
    "phase.starts=2", "dictionary.features=12", "dictionary.hidden=6", "dictionary.active=[0.1]", "dictionary.main=0.1",
    "dictionary.toy_steps=200", "dictionary.sae_steps=30", "dictionary.vectors=2000", "dictionary.batch_size=256",
    "steering.correlations=[0,1]", "steering.samples=300",
]  # fmt: skip


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def toy() -> Toys:
    """Six features, each with a dimension for itself: no superposition, so everything is known."""
    return Toys(torch.eye(6).unsqueeze(0), torch.zeros(1, 6))


SIX = SuperpositionConfig(
    name="six", run_dir="six",
    dictionary=DictionaryConfig(features=6, hidden=6, active=[0.2], main=0.2, vectors=4000),
    steering=SteeringConfig(samples=1000),
)  # fmt: skip


def test_features_are_active_as_often_as_asked_and_together_as_correlated(generator: torch.Generator) -> None:
    p = torch.tensor([0.1, 0.5])
    on = draw_features((2, 20_000, 4), p, generator, correlation=0.8)[:, :, :] > 0
    assert torch.allclose(on[..., 0::2].double().mean((1, 2)), p.double(), atol=0.01)
    together = (on[..., 0::2] & on[..., 1::2]).sum((1, 2)) / on[..., 0::2].sum((1, 2))
    assert torch.allclose(together, p + (1 - p) * 0.8, atol=0.03)


def test_dense_features_fill_the_dimensions_and_sparse_ones_share_them() -> None:
    importance = (0.7 ** torch.arange(6)).expand(2, -1)
    toys = train_toys(torch.tensor([1.0, 0.02]), importance, hidden=2, steps=400, batch_size=256, seed=0)
    stored = lengths(toys) > REPRESENTED
    assert stored[0].tolist() == [True, True, False, False, False, False]  # as principal components would
    assert int(stored[1].sum()) > 3
    shared = interference(toys)
    assert float(shared[0, :2].max()) < 0.05
    assert float(shared[1][stored[1]].max()) > 0.2


def test_interference_is_the_formula() -> None:
    W = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])  # columns (3, 4) and (1, 0)
    shared = interference(Toys(W, torch.zeros(1, 2)))
    assert shared[0].tolist() == pytest.approx([0.36, 9.0], abs=1e-5)


def test_match_uses_every_candidate_once_and_minds_the_sign() -> None:
    features = torch.eye(3)
    perfect = match(2 * features[[2, 0, 1]], features)
    assert perfect == {"mean_max_cosine": 1.0, "matched_cosine": 1.0, "recovered": 1.0}
    between = torch.tensor([[1.0, 1.0, 0.0]])
    one = match(between, features)
    assert one["mean_max_cosine"] == pytest.approx(2**0.5 / 3, abs=1e-6)
    assert one["matched_cosine"] == pytest.approx(0.5**0.5 / 3, abs=1e-6)
    assert match(-features, features)["recovered"] == 0.0
    assert match(-features, features, signed=False)["recovered"] == 1.0


def test_supervised_directions_find_what_they_are_told_of(toy: Toys, generator: torch.Generator) -> None:
    x = draw_features((1, 4000, 6), torch.tensor([0.2]), generator)
    h, on = toy.hidden(x)[0], x[0] > 0
    differences = mean_differences(h, on)
    assert torch.allclose(differences[2], h[on[:, 2]].mean(0) - h[~on[:, 2]].mean(0), atol=1e-5)
    for directions in (differences, probe_directions(h, on)):
        assert match(directions, torch.eye(6))["matched_cosine"] > 0.98


def test_an_sae_finds_features_that_have_their_own_dimensions(toy: Toys, generator: torch.Generator) -> None:
    config = DictionaryConfig(features=6, hidden=6, active=[0.2], main=0.2, expansion=2, sae_steps=300, batch_size=256)
    draw = partial(draw_hidden, toy, 0.2, generator)
    with initialize(ParallelLayout(micro_batch_size=256)) as context:
        sae = train_sae("batch_topk", draw, context, hidden=6, k=2, config=config, seed=0)
    h = draw(2000)
    values = latents(sae, h)
    assert values.shape == (2000, 12)
    assert variance_explained(sae, h) > 0.8
    assert match(sae.W_dec.detach()[(values > 0).any(0)], torch.eye(6))["recovered"] >= 0.5


def test_steering_without_strength_is_no_steering(toy: Toys, generator: torch.Generator) -> None:
    task = task_of(toy, make_samples(SIX, 0, generator, correlation=0.5))
    nothing = 0.0 * torch.randn(6, generator=generator)
    assert torch.equal(steered(toy, task.h_Bm, nothing), steered(toy, task.h_Bm))
    assert float(error(toy, task, nothing)) == 1.0


def test_samples_want_the_first_of_a_pair_and_with_it_what_goes_with_it(generator: torch.Generator) -> None:
    alone = make_samples(SIX, 1, generator, correlation=0.0)
    assert (alone.x_Bn[:, 2] == 0).all()
    assert (alone.wanted_Bn[:, 2] == 0.75).all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(alone.wanted_Bn[:, others], alone.x_Bn[:, others])
    together = make_samples(SIX, 1, generator, correlation=1.0)
    assert (together.wanted_Bn[:, 3] > 0).all()


def test_the_true_direction_steers_and_one_that_holds_more_has_a_side_effect(
    toy: Toys, generator: torch.Generator
) -> None:
    task = task_of(toy, make_samples(SIX, 0, generator, correlation=0.0))
    true = 0.75 * torch.eye(6)[0]
    assert float(error(toy, task, true)) < 1e-6
    assert side_effect(toy, task, true, 0) == pytest.approx(0.0, abs=1e-6)
    assert side_effect(toy, task, 0.75 * (torch.eye(6)[0] + torch.eye(6)[1]), 0) == pytest.approx(1.0)


def test_difference_of_means_fails_out_of_distribution(toy: Toys, generator: torch.Generator) -> None:
    found = measure_steering(toy, {}, SIX, correlation=1.0, generator=generator)
    means, true = found["difference of means"], found["true direction"]
    assert means["inside"] < 0.2 < true["inside"]
    assert true["outside"] < 0.1 < 0.5 < means["outside"]
    assert means["side_effect"] > 0.5
    apart = measure_steering(toy, {}, SIX, correlation=0.0, generator=generator)
    assert apart["difference of means"]["outside"] < 0.1


def test_whole_experiment_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["superposition/small", *TINY]) == 0
    root = tmp_path / "runs" / "tiny"
    found = json.loads((root / "results.json").read_text())["results"]
    rows = found["recovery"]["0.1"]
    assert {name for name in rows if name.startswith("SAE")} == {
        f"SAE {name}" for name in ("relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka")
    }
    assert rows["difference of means *"]["matched_cosine"][0] > rows["random directions"]["matched_cosine"][0]
    assert set(found["steering"]) == {"0.0", "1.0"}
    for plot in ("superposition.png", "steering.png"):
        assert (root / plot).stat().st_size > 10_000
    capsys.readouterr()
    assert main(["superposition/small", *TINY]) == 0
    assert capsys.readouterr().out.count("done before") == 5
