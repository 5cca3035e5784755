"""Edits do to the probe's logits what they say, by the least change; strength 0 is no edit."""

import itertools

import pytest
import torch

from steerscale.errors import ConfigError
from steerscale.interp.probes.edit import probe_edit
from steerscale.interp.probes.probe import Probe

WIDTH = 16


def make_probe(number: int = 5, *, kind: str = "logistic") -> Probe:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden = {"hidden_weight_HM": draw(7, WIDTH), "hidden_bias_H": draw(7)} if kind == "mlp" else {}
    return Probe(
        hook="blocks.1.hook_resid_post",
        kind=kind,
        classes=tuple("abcdefgh"[:number]),
        weight_CM=draw(number, 7 if hidden else WIDTH),
        bias_C=draw(number),
        means_CM=draw(number, WIDTH),
        **hidden,
    )


X = torch.randn(3, 50, WIDTH, generator=torch.Generator().manual_seed(1))


def margin(probe: Probe, x: torch.Tensor, target: int, other: int | None = None) -> torch.Tensor:
    logits = probe.logits(x)
    rivals = logits.clone()
    rivals[..., target] = -torch.inf
    return logits[..., target] - (rivals.max(dim=-1).values if other is None else logits[..., other])


def edited(probe: Probe, *args: object, **kwargs: object) -> torch.Tensor:
    found = probe_edit(probe, *args, **kwargs)(X.clone())  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("value", [-4.0, 0.0, 2.5])
@pytest.mark.parametrize("number", [2, 5])
def test_set_gives_the_margin_everywhere(number: int, value: float) -> None:
    probe = make_probe(number)
    before, after = margin(probe, X, 1), margin(probe, edited(probe, "set", target="b", value=value), 1)
    torch.testing.assert_close(after, torch.full_like(after, value), rtol=0, atol=1e-4)
    assert (before > value).any()
    assert (before < value).any()
    if number > 2:
        pair = margin(probe, edited(probe, "set", target="b", other="d", value=value), 1, 3)
        torch.testing.assert_close(pair, torch.full_like(pair, value), rtol=0, atol=1e-4)


def test_set_changes_as_little_as_possible() -> None:
    """Against the best of all subsets of rivals that may bind: the projection onto a polyhedron by brute force."""
    probe, value = make_probe(5), 3.0
    delta_VM = (edited(probe, "set", target="b", value=value) - X).flatten(0, 1)
    x_VM, rivals = X.flatten(0, 1), [0, 2, 3, 4]
    ways_RM = probe.weight_CM[1] - probe.weight_CM[rivals]
    for x_M, delta_M in zip(x_VM, delta_VM):
        missing_R = value - (ways_RM @ x_M + probe.bias_C[1] - probe.bias_C[rivals])
        lengths = []
        if float(missing_R.max()) <= 0:  # lowered: to the nearest of the boundaries
            lengths = [float(gap.abs() / way.norm()) for gap, way in zip(missing_R, ways_RM)]
        else:
            for size in range(1, 5):
                for chosen in itertools.combinations(range(4), size):
                    step_M = torch.linalg.pinv(ways_RM[list(chosen)]) @ missing_R[list(chosen)]
                    if bool((ways_RM @ step_M >= missing_R - 1e-4).all()):
                        lengths.append(float(step_M.norm()))
        assert float(delta_M.norm()) == pytest.approx(min(lengths), rel=1e-3)


def test_swap_changes_the_sign_of_the_difference() -> None:
    probe = make_probe()
    swapped = edited(probe, "swap", target="b", other="d")
    torch.testing.assert_close(margin(probe, swapped, 1, 3), -margin(probe, X, 1, 3), rtol=0, atol=1e-4)
    again = probe_edit(probe, "swap", target="b", other="d")(swapped.clone())
    torch.testing.assert_close(again, X, rtol=0, atol=1e-5)


def test_project_leaves_nothing_to_tell_classes_by() -> None:
    probe = make_probe()
    shares = probe.logits(edited(probe, "project")).softmax(dim=-1)
    torch.testing.assert_close(shares, shares[:1, :1].expand_as(shares), rtol=0, atol=1e-5)
    one = edited(probe, "project", target="b", other="d")
    gap = margin(probe, one, 1, 3)
    torch.testing.assert_close(gap, gap[:1, :1].expand_as(gap), rtol=0, atol=1e-4)
    assert float(margin(probe, one, 0, 2).std()) > 0.5


def test_add_moves_by_the_distance_of_the_means() -> None:
    probe = make_probe(2)
    way_M = probe.weight_CM[1] - probe.weight_CM[0]
    moved = (edited(probe, "add", target="b", value=1.0) - X) @ way_M
    expected = (probe.means_CM[1] - probe.means_CM[0]) @ way_M
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-4, atol=1e-4)
    back = probe_edit(probe, "add", target="b", value=-1.0)(edited(probe, "add", target="b", value=1.0))
    torch.testing.assert_close(back, X, rtol=0, atol=1e-5)


def test_strength_positions_and_classes_limit_the_edit() -> None:
    probe = make_probe()
    assert probe_edit(probe, "set", target="b", value=9.0, strength=0.0)(X.clone()) is None
    whole, half = (edited(probe, "set", target="b", value=9.0, strength=strength) - X for strength in (1.0, 0.5))
    torch.testing.assert_close(half * 2, whole, rtol=0, atol=1e-5)
    there = edited(probe, "set", target="b", value=9.0, positions=[-1])
    assert torch.equal(there[:, :-1], X[:, :-1])
    torch.testing.assert_close(there[:, -1] - X[:, -1], whole[:, -1])
    only = edited(probe, "set", target="b", value=9.0, where="d")
    is_d = probe.logits(X).argmax(dim=-1) == 3
    assert torch.equal(only[~is_d], X[~is_d])
    torch.testing.assert_close(only[is_d] - X[is_d], whole[is_d])
    assert is_d.any()


def test_no_change_keeps_bits() -> None:
    probe = make_probe(2)
    x = torch.full((1, 3, WIDTH), -0.0, dtype=torch.bfloat16)
    same = probe_edit(probe, "add", target="b", value=0.0)(x.clone())
    assert same is not None
    assert same.dtype == torch.bfloat16
    assert torch.signbit(same).all()


def test_edits_refuse_what_they_cannot_do() -> None:
    probe = make_probe()
    for wrong, kwargs in (
        ("no class 'z'", {"mode": "set", "target": "z"}),
        ("needs a target", {"mode": "add"}),
        ("needs the other", {"mode": "swap", "target": "a"}),
        ("must differ", {"mode": "swap", "target": "a", "other": "a"}),
        ("must be one of", {"mode": "flip", "target": "a"}),
        ("value .* finite", {"mode": "set", "target": "a", "value": float("nan")}),
        ("strength .* finite", {"mode": "project", "strength": float("inf")}),
    ):
        with pytest.raises(ConfigError, match=wrong):
            probe_edit(probe, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no directions"):
        probe_edit(make_probe(kind="mlp"), "set", target="a")
