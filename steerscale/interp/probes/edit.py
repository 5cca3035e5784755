"""Edits of activations by a linear probe: the least change after which the probe says something else.

    add       x + value * d           d: from the other classes' mean to the class's, the part along the probe's direction
    project   x - Q Q' (x - mean)     Q: an orthonormal basis of the directions; the probe cannot tell classes apart any more
    set       the nearest x' whose margin is `value`; the margin: logit of the class - largest logit of the others, or
              with `other` the logit of that one class
    swap      x mirrored at the boundary of two classes: their logits' difference changes its sign

For C = 2 `set` is Nanda et al. 2023's and Li et al. 2023's intervention in closed form: x + (value - margin) v / |v|^2.
For more classes, raising a margin is a small quadratic programme (below each of the others: C - 1 half-spaces); lowering it
moves to the nearest boundary of the union, which is one of the pairs'.

Shapes: V vectors, M d_model, C classes, R rivals (C - 1).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

from steerscale.config import require
from steerscale.errors import ConfigError
from steerscale.interp.interventions import Positions, at_positions
from steerscale.interp.probes.probe import Probe
from steerscale.models.hooks import HookFunction

Mode = Literal["add", "project", "set", "swap"]
MODES = ("add", "project", "set", "swap")
SWEEPS = 200
"""Of the coordinate ascent: enough for the classes of a probe, whose rivals are tens."""


def probe_edit(
    probe: Probe,
    mode: Mode,
    *,
    target: str | None = None,
    other: str | None = None,
    value: float = 0.0,
    strength: float = 1.0,
    where: str | None = None,
    positions: Positions = None,
) -> HookFunction:
    """A function for `probe.hook` in everything that takes functions by hook point.

    Args:
        target: the class that is added, projected out (None: what tells any classes apart), set, or swapped.
        other: the class that `set` compares with and `swap` swaps with. Two classes need it not.
        value: of `add`, in distances between the classes' means; of `set`, the margin in the probe's logits.
        strength: factor of the whole change; 0 changes nothing, bit by bit.
        where: act only at tokens that the probe takes for this class.
        positions: act only there (see `interventions`); None while text is generated.
    Raises ConfigError: an MLP probe, classes it has not, a mode without the classes it needs, or numbers that are not finite.
    """
    if not probe.is_linear:
        raise ConfigError(f"the probe {probe.name} has no directions to edit by: choose a linear one, like logistic")
    require(mode in MODES, f"a probe's edit must be one of {', '.join(MODES)}, got {mode!r}")
    for name, number in (("value", value), ("strength", strength)):
        require(math.isfinite(number), f"the {name} of a probe's edit must be a finite number, got {number}")
    require(
        target is not None or mode == "project", f"the edit {mode!r} needs a target: one of {', '.join(probe.classes)}"
    )
    chosen = None if target is None else probe.class_index(target)
    against = None if other is None else probe.class_index(other)
    if against is None and chosen is not None and len(probe.classes) == 2:
        against = 1 - chosen
    require(mode != "swap" or against is not None, "the edit 'swap' needs the other of the two classes")
    require(chosen is None or chosen != against, f"the two classes of an edit must differ, both are {target!r}")
    only = None if where is None else probe.class_index(where)
    if strength == 0:
        return lambda x_BSM: None
    make: dict[str, Callable[[], _Delta]] = {
        "add": lambda: _add(probe, _known(chosen), against, value),
        "project": lambda: _project(probe, chosen, against),
        "set": lambda: _set(probe, _known(chosen), against, value),
        "swap": lambda: _swap(probe, _known(chosen), _known(against)),
    }
    delta = make[mode]()

    def change(x_BSM: torch.Tensor) -> torch.Tensor:
        x_VM = x_BSM.flatten(0, -2).float()
        delta_VM = strength * delta(x_VM)
        if only is not None:
            delta_VM = delta_VM * (probe.to(x_VM.device).logits(x_VM).argmax(dim=1) == only).unsqueeze(1)
        acts_V1 = (delta_VM != 0).any(dim=1, keepdim=True)  # adding zero would turn -0 into 0
        changed_VM = torch.where(acts_V1, x_VM + delta_VM, x_VM)
        return changed_VM.to(x_BSM.dtype).view_as(x_BSM)

    return at_positions(positions, change)


_Delta = Callable[[torch.Tensor], torch.Tensor]
"""Activations float32 [V, M] -> what is added to them."""


def _known(index: int | None) -> int:
    assert index is not None
    return index


def direction(probe: Probe, target: int, other: int | None = None) -> torch.Tensor:
    """[M]: the way on which the logit of `target` grows over the other's, or over the mean of the others."""
    weight_CM = probe.weight_CM.float()
    if other is not None:
        return weight_CM[target] - weight_CM[other]
    number = len(probe.classes)
    return (weight_CM[target] - weight_CM.mean(dim=0)) * (number / (number - 1))


def _add(probe: Probe, target: int, other: int | None, value: float) -> _Delta:
    way_M = direction(probe, target, other)
    means_CM = probe.means_CM.float()
    others = [index for index in range(len(probe.classes)) if index != target] if other is None else [other]
    apart_M = means_CM[target] - means_CM[others].mean(dim=0)
    norm = float(way_M.norm())
    require(norm > 0, f"the probe {probe.name} has no direction for {probe.classes[target]!r}: its weights are zeros")
    delta_M = value * float(apart_M @ way_M) / norm**2 * way_M
    return lambda x_VM: delta_M.to(x_VM.device).expand_as(x_VM)


def _project(probe: Probe, target: int | None, other: int | None) -> _Delta:
    if target is None:
        ways_RM = probe.weight_CM.float()[1:] - probe.weight_CM.float()[:1]
    else:
        ways_RM = direction(probe, target, other).unsqueeze(0)
    # Directions that the rounding of float32 leaves to others are none.
    _, singular_R, basis_RM = torch.linalg.svd(ways_RM.double(), full_matrices=False)
    basis_RM = basis_RM[singular_R > 1e-6 * singular_R.max().clamp_min(1e-30)].float()
    mean_M = probe.means_CM.float().mean(dim=0)

    def delta(x_VM: torch.Tensor) -> torch.Tensor:
        basis = basis_RM.to(x_VM.device)
        return -((x_VM - mean_M.to(x_VM.device)) @ basis.T) @ basis

    return delta


def _swap(probe: Probe, target: int, other: int) -> _Delta:
    pair = _set_pair(probe, target, other)
    return lambda x_VM: 2 * pair(x_VM, 0.0)


def _set(probe: Probe, target: int, other: int | None, value: float) -> _Delta:
    if other is not None:
        pair = _set_pair(probe, target, other)
        return lambda x_VM: pair(x_VM, value)
    rivals = [index for index in range(len(probe.classes)) if index != target]
    ways_RM = probe.weight_CM.float()[target] - probe.weight_CM.float()[rivals]
    bias_R = probe.bias_C.float()[target] - probe.bias_C.float()[rivals]
    require(bool((ways_RM.norm(dim=1) > 0).all()), f"the probe {probe.name} does not tell some classes apart")

    def delta(x_VM: torch.Tensor) -> torch.Tensor:
        ways, bias = ways_RM.to(x_VM.device), bias_R.to(x_VM.device)
        missing_VR = value - (x_VM @ ways.T + bias)
        raised_VM = least_change(ways, missing_VR) @ ways
        # Above: every rival is too far off, and the nearest boundary is that of the one which the least step reaches.
        step_VR = missing_VR / ways.norm(dim=1)
        nearest_V = step_VR.abs().argmin(dim=1)
        nearest_VM = ways[nearest_V]
        share_V = missing_VR.gather(1, nearest_V[:, None]) / nearest_VM.square().sum(dim=1, keepdim=True)
        return torch.where((missing_VR > 0).any(dim=1, keepdim=True), raised_VM, share_V * nearest_VM)

    return delta


def _set_pair(probe: Probe, target: int, other: int) -> Callable[[torch.Tensor, float], torch.Tensor]:
    way_M = direction(probe, target, other)
    bias = float(probe.bias_C[target] - probe.bias_C[other])
    square = float(way_M.square().sum())
    require(square > 0, f"the probe {probe.name} does not tell {probe.classes[target]!r} from {probe.classes[other]!r}")

    def delta(x_VM: torch.Tensor, value: float) -> torch.Tensor:
        way = way_M.to(x_VM.device)
        return ((value - (x_VM @ way + bias)) / square).unsqueeze(1) * way

    return delta


def least_change(ways_RM: torch.Tensor, missing_VR: torch.Tensor) -> torch.Tensor:
    """Multipliers [V, R] >= 0 of the rows of `ways`: their sum is the shortest d [M] with ways @ d >= missing.

    The dual, max missing'l - l'Gl / 2 over l >= 0 with G = ways ways', by cyclic coordinate ascent (Hildreth 1957), in float64.
    """
    gram_RR = (ways_RM.double() @ ways_RM.double().T).clone()
    missing = missing_VR.double()
    multipliers_VR = torch.zeros_like(missing)
    tolerance = 1e-7 * float(missing.abs().max().clamp_min(1e-30))
    for _ in range(SWEEPS):
        moved = 0.0
        for rival in range(len(gram_RR)):
            short_V = missing[:, rival] - multipliers_VR @ gram_RR[rival]
            new_V = (multipliers_VR[:, rival] + short_V / gram_RR[rival, rival]).clamp_min(0)
            moved = max(moved, float(((new_V - multipliers_VR[:, rival]) * gram_RR[rival, rival]).abs().max()))
            multipliers_VR[:, rival] = new_V
        if moved < tolerance:
            break
    return multipliers_VR.to(missing_VR.dtype)
