"""Fits against their definitions: the optimum of the objective, closed forms, calibration; files that come back."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from steerscale.errors import ConfigError, DataError
from steerscale.interp.probes.control import control_labels
from steerscale.interp.probes.fit import FitConfig, fit_probe, standardise, temperature
from steerscale.interp.probes.probe import KINDS, Probe, calibration_error, probe_names, read_probe, score, write_probe
from tests.disks import fill, small_disk

HOOK, CLASSES = "blocks.1.hook_resid_post", ("a", "b", "c")


def draw(number: int = 1500, width: int = 12, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations on very different scales, and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    mixing_MM = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) @ torch.diag(
        torch.logspace(1, -1, width)
    )
    x_VM = torch.randn(number, width, generator=generator) @ mixing_MM + 5
    way_MC = torch.linalg.inv(mixing_MM) @ torch.randn(width, 3, generator=torch.Generator().manual_seed(7)) * 2
    return x_VM, torch.multinomial(((x_VM - 5) @ way_MC).softmax(dim=1), 1, generator=generator)[:, 0]


def objective(probe: Probe, x_VM: torch.Tensor, y_V: torch.Tensor, l2: float) -> float:
    weight_CM = probe.weight_CM * standardise(x_VM).deviation_M
    return float(cross_entropy(probe.logits(x_VM), y_V, reduction="sum") + l2 / 2 * weight_CM.square().sum())


@pytest.mark.parametrize("l2", [0.1, 30.0])
def test_logistic_reaches_the_minimum_of_its_objective(l2: float) -> None:
    x_VM, y_V = draw()
    probe = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind="logistic", config=FitConfig(l2=l2, tolerance=1e-5))
    weight_CM, bias_C = probe.weight_CM.double().requires_grad_(), probe.bias_C.double().requires_grad_()
    deviation_M = standardise(x_VM).deviation_M.double()
    reference = torch.optim.LBFGS(
        [weight_CM, bias_C], max_iter=3000, history_size=50, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        reference.zero_grad()
        value = cross_entropy(x_VM.double() @ weight_CM.T + bias_C, y_V, reduction="sum")
        value = value + l2 / 2 * (weight_CM * deviation_M).square().sum()
        value.backward()
        return value

    reference.step(loss)  # type: ignore[arg-type]
    least = loss().item()
    found = objective(probe, x_VM, y_V, l2)
    assert found == pytest.approx(least, rel=1e-4)
    half = Probe(**{**vars(probe), "weight_CM": probe.weight_CM * 0.8})
    assert objective(half, x_VM, y_V, l2) > found * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_vectors_with_next_to_no_penalty_are_fitted(kind: str) -> None:
    x_VM, y_V = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 0, 1, 1])
    probe = fit_probe(x_VM, y_V, ("a", "b"), hook=HOOK, kind=kind, config=FitConfig(l2=1e-30, epochs=200))
    assert torch.equal(probe.logits(x_VM).argmax(dim=1), y_V)


def test_scikit_learn_finds_the_same_probe() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_VM, y_V = draw()
    z_VM = standardise(x_VM).z_VM
    peer = linear_model.LogisticRegression(C=1 / 5.0, max_iter=2000, tol=1e-6).fit(z_VM.numpy(), y_V.numpy())
    probe = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind="logistic", config=FitConfig(l2=5.0, tolerance=1e-5))
    shares_VC = torch.from_numpy(peer.predict_proba(z_VM.numpy())).float()
    torch.testing.assert_close(probe.logits(x_VM).softmax(dim=1), shares_VC, rtol=0, atol=5e-3)


def test_closed_forms_are_what_they_say() -> None:
    x_VM, y_V = draw()
    y_V = y_V.clamp_max(1)
    probes = {
        kind: fit_probe(x_VM, y_V, ("a", "b"), hook=HOOK, kind=kind, config=FitConfig(l2=2.0, shrinkage=0.0))
        for kind in KINDS
    }
    zero, one = x_VM[y_V == 0], x_VM[y_V == 1]
    apart_M, middle_M = one.mean(0) - zero.mean(0), (one.mean(0) + zero.mean(0)) / 2
    ways = {kind: probe.weight_CM[1] - probe.weight_CM[0] for kind, probe in probes.items() if probe.is_linear}
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(ways["diff_means"], apart_M, dim=0)) > 0.9999
    logits_C = probes["diff_means"].logits(middle_M)
    assert float(logits_C[0] - logits_C[1]) == pytest.approx(0, abs=1e-4)
    within_MM = ((zero - zero.mean(0)).T @ (zero - zero.mean(0)) + (one - one.mean(0)).T @ (one - one.mean(0))) / len(
        x_VM
    )
    corrected_M = torch.linalg.solve(within_MM.double(), apart_M.double()).float()
    assert float(cosine(ways["mass_mean"], corrected_M, dim=0)) > 0.999
    z_VM = standardise(x_VM).z_VM.double()
    targets_V = y_V.double() - y_V.double().mean()
    ridge_M = (
        torch.linalg.solve(z_VM.T @ z_VM + 2 * torch.eye(12), z_VM.T @ targets_V).float()
        / standardise(x_VM).deviation_M
    )
    assert float(cosine(ways["ridge"], ridge_M, dim=0)) > 0.9999


def test_every_kind_beats_the_guess_and_only_mlp_reads_an_exclusive_or() -> None:
    x_VM, y_V = draw()
    new_VM, new_V = draw(seed=3)
    guess = float((new_V == torch.bincount(y_V).argmax()).double().mean())
    for kind in KINDS:
        config = FitConfig(epochs=40)
        probe = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind=kind, config=config)
        assert score(probe.logits(new_VM), new_V).accuracy > guess + 0.05, kind
    xor_V = ((x_VM[:, 0] > x_VM[:, 0].median()) ^ (x_VM[:, 1] > x_VM[:, 1].median())).long()
    right = {
        kind: score(
            fit_probe(x_VM, xor_V, ("a", "b"), hook=HOOK, kind=kind, config=FitConfig(epochs=60)).logits(x_VM), xor_V
        ).accuracy
        for kind in ("logistic", "mlp")
    }
    assert right["mlp"] > 0.8 > 0.7 > right["logistic"]


def test_calibration_error_and_temperature() -> None:
    # Two bins: 0.9 sure and right 3 of 4 times, 0.6 sure and right 1 of 2 times.
    shares = [0.9] * 4 + [0.6] * 2
    logits_VC = torch.tensor([[share, 1 - share] for share in shares]).log()
    y_V = torch.tensor([0, 0, 0, 1, 0, 1])
    assert calibration_error(logits_VC, y_V) == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    found = score(logits_VC, y_V)
    assert (found.accuracy, found.balanced_accuracy) == pytest.approx((4 / 6, 0.5))
    x_VM, y_V = draw()
    logits_VC = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind="logistic").logits(x_VM)
    factor = temperature(logits_VC * 8, y_V)
    losses = [float(cross_entropy(logits_VC * 8 * factor * change, y_V)) for change in (0.95, 1.0, 1.05)]
    assert losses[1] < min(losses[0], losses[2])


def test_control_labels_depend_on_the_type_alone() -> None:
    counts_C = torch.tensor([700, 300, 0])
    types = [f"word{number}" for number in range(3000)] + ["word5", "word6"]
    labels_V = control_labels(types, counts_C, seed=1)
    assert labels_V[5] == labels_V[-2]
    assert labels_V[6] == labels_V[-1]
    assert float((labels_V == 0).double().mean()) == pytest.approx(0.7, abs=0.03)
    assert int(labels_V.max()) == 1
    assert not torch.equal(labels_V, control_labels(types, counts_C, seed=2))
    assert torch.equal(control_labels(types[3:5], counts_C, seed=1), labels_V[3:5])


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_probes_come_back_from_disk(kind: str, tmp_path: Path) -> None:
    x_VM, y_V = draw(300)
    probe = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind=kind, position="mean", about={"accuracy": 0.5})
    write_probe(probe, tmp_path)
    back = read_probe(tmp_path)
    assert torch.equal(back.logits(x_VM), probe.logits(x_VM))
    assert (back.hook, back.kind, back.classes, back.position, back.about) == (HOOK, kind, CLASSES, "mean", probe.about)
    assert probe_names(tmp_path) == [f"{HOOK}.{kind}"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "who may read one file may read the other"


def test_probes_on_a_full_disk_are_an_error_of_the_disk(tmp_path: Path) -> None:
    x_VM, y_V = draw(60)
    probe = fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind="diff_means")
    with small_disk(tmp_path / "disk", kib=16) as disk:
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            write_probe(probe, disk)


def test_reading_probes_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no probes"):
        read_probe(tmp_path)
    x_VM, y_V = draw(300)
    for kind in ("ridge", "diff_means"):
        write_probe(fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind=kind), tmp_path)
    with pytest.raises(ConfigError, match="several probes fit"):
        read_probe(tmp_path, hook=HOOK)
    with pytest.raises(ConfigError, match=r"no probe fits hook blocks\.2"):
        read_probe(tmp_path, hook="blocks.2.hook_resid_post")
    about = tmp_path / f"{HOOK}.ridge.json"
    values = json.loads(about.read_text())
    about.write_text(json.dumps({**values, "classes": ["a", "b"]}))
    with pytest.raises(DataError, match="not a valid probe"):
        read_probe(tmp_path, kind="ridge")
    about.write_text("{")
    with pytest.raises(DataError, match="cannot be read as a probe"):
        read_probe(tmp_path, kind="ridge")


def test_fits_refuse_what_they_cannot_do() -> None:
    x_VM, y_V = draw(300)
    with pytest.raises(DataError, match="c have none"):
        fit_probe(x_VM, y_V.clamp_max(1), CLASSES, hook=HOOK, kind="ridge")
    with pytest.raises(ConfigError, match="kind must be one of"):
        fit_probe(x_VM, y_V, CLASSES, hook=HOOK, kind="forest")
    with pytest.raises(DataError, match="not finite"):
        fit_probe(torch.full_like(x_VM, float("inf")), y_V, CLASSES, hook=HOOK, kind="ridge")
    with pytest.raises(ConfigError, match="shrinkage"):
        FitConfig(shrinkage=1.5)
