"""Fits of probes: activations and labels in, weights out.

    logistic    argmin sum of cross-entropies + l2/2 |W|^2, W on standardised activations (scikit-learn's objective, C = 1 / l2)
    ridge       regression of 0/1 targets on standardised activations, l2 the same
    diff_means  nearest class mean; of two classes, their difference with the boundary half-way
    mass_mean   nearest class mean under the covariance within classes (Marks, Tegmark 2023, section 4.1; linear discriminant)
    mlp         one hidden layer of ReLUs, AdamW

All but logistic and mlp are no probabilities; one factor on their logits (a temperature, Guo et al. 2017) fitted on the
training data makes them comparable, and changes no answer.

Shapes: V vectors, M d_model, C classes, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.interp.probes.probe import KINDS, Probe


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How probes are fitted."""

    l2: float = 100.0
    """Penalty of logistic and ridge on standardised activations; scikit-learn's 1 / C."""
    per_coordinate: bool = True
    """Standardise each coordinate by its own deviation; False: all by the median one. Predictions are best with True; with
    False the penalty does not favour coordinates that hardly move: weights are directions that activations vary along."""
    shrinkage: float = 0.01
    """Of mass_mean's covariance towards its diagonal."""
    iterations: int = 200
    """At most, of logistic."""
    tolerance: float = 5e-4
    """Logistic ends when no entry of the preconditioned gradient of the mean loss is larger."""
    hidden: int = 256
    """Width of mlp."""
    epochs: int = 10
    """Of mlp."""
    learning_rate: float = 1e-3
    """Of mlp."""
    batch_size: int = 512
    """Of mlp."""
    seed: int = 0
    """Of mlp's initial weights and order."""

    def __post_init__(self) -> None:
        for name in ("l2", "tolerance", "learning_rate"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("iterations", "hidden", "epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0 <= self.shrinkage <= 1, f"shrinkage must be from 0 to 1, got {self.shrinkage}")


class Linear(NamedTuple):
    """logits = x W' + b."""

    weight_CM: torch.Tensor
    bias_C: torch.Tensor


def fit_probe(
    x_VM: torch.Tensor,
    y_V: torch.Tensor,
    classes: tuple[str, ...],
    *,
    hook: str,
    kind: str,
    position: str = "last",
    config: FitConfig | None = None,
    about: dict[str, Any] | None = None,
) -> Probe:
    """Fit one probe.

    Args:
        x_VM: float activations; y_V: int64 labels, indices of `classes`, on the same device.
    Raises:
        ConfigError: no such kind.
        DataError: a class without an example, or activations that are not finite.
    """
    require(kind in KINDS, f"a probe's kind must be one of {', '.join(KINDS)}, got {kind!r}")
    counts = torch.bincount(y_V, minlength=len(classes))
    if len(classes) < 2 or int(counts.min()) == 0:
        missing = [name for name, count in zip(classes, counts.tolist()) if not count]
        raise DataError(
            f"a probe needs examples of at least two classes; {', '.join(missing) or 'the others'} have none"
        )
    config, x_VM = config or FitConfig(), x_VM.float()
    means_CM = class_means(x_VM, y_V, len(classes))
    if not bool(means_CM.isfinite().all()):
        raise DataError(f"activations at {hook} are not finite: the language model is damaged or overflows")
    common: dict[str, Any] = {
        "hook": hook, "kind": kind, "classes": classes, "means_CM": means_CM, "position": position, "about": about or {}
    }  # fmt: skip
    if kind == "mlp":
        return Probe(**_fit_mlp(x_VM, y_V, len(classes), config), **common)
    found = _LINEAR[kind](x_VM, y_V, means_CM, config)
    if kind != "logistic":
        factor = temperature(x_VM @ found.weight_CM.T + found.bias_C, y_V)
        found = Linear(found.weight_CM * factor, found.bias_C * factor)
    return Probe(weight_CM=found.weight_CM, bias_C=found.bias_C, **common)


def class_means(x_VM: torch.Tensor, y_V: torch.Tensor, number: int) -> torch.Tensor:
    """[C, M] in float32, summed in float64."""
    sums_CM = torch.zeros(number, x_VM.shape[1], dtype=torch.float64, device=x_VM.device)
    for part_VM, part_V in zip(x_VM.split(8192), y_V.split(8192)):
        sums_CM.index_add_(0, part_V, part_VM.double())
    return (sums_CM / torch.bincount(y_V, minlength=number).unsqueeze(1)).float()


class Standard(NamedTuple):
    """Activations with mean 0 and standard deviation 1, and the way back."""

    z_VM: torch.Tensor
    mean_M: torch.Tensor
    deviation_M: torch.Tensor

    def fold(self, weight_CM: torch.Tensor, bias_C: torch.Tensor) -> Linear:
        """The same function of activations as they are."""
        weight_CM = weight_CM / self.deviation_M
        return Linear(weight_CM, bias_C - weight_CM @ self.mean_M)


def standardise(x_VM: torch.Tensor, *, per_coordinate: bool = True) -> Standard:
    """Coordinates that never change stay 0. `per_coordinate`: see `FitConfig`."""
    deviation_M, mean_M = torch.std_mean(x_VM, dim=0, correction=0)
    if not per_coordinate:
        deviation_M = deviation_M.median().expand_as(deviation_M).contiguous()
    deviation_M = torch.where(deviation_M > 0, deviation_M, 1)
    return Standard((x_VM - mean_M) / deviation_M, mean_M, deviation_M)


def fit_logistic(x_VM: torch.Tensor, y_V: torch.Tensor, means_CM: torch.Tensor, config: FitConfig) -> Linear:
    """Multinomial logistic regression by preconditioned L-BFGS; the bias is not penalised.

    Coordinates of a residual stream are correlated, and plain L-BFGS takes hundreds of passes over the data. The Hessian
    at W = 0 is (I - 11'/C) / C times the activations' covariance (plus the penalty): with U = L' W, LL' = covariance / C +
    penalty, one Cholesky factor of M x M, it begins near the identity and tens of passes suffice.
    """
    number, count = len(means_CM), len(x_VM)
    standard = standardise(x_VM, per_coordinate=config.per_coordinate)
    z_VM = standard.z_VM
    gram_MM = (z_VM.T @ z_VM).double() / (count * number)
    # It only sets the pace. With fewer activations than coordinates a tiny penalty would leave it singular but for float32's
    # rounding, of either sign.
    damping = max(config.l2 / count, 1e-6 * len(gram_MM) / number)
    factor_MM = torch.linalg.cholesky(gram_MM + torch.eye(len(gram_MM), device=x_VM.device) * damping).float()
    u_MC = torch.zeros(z_VM.shape[1], number, device=x_VM.device, requires_grad=True)
    stretch = number**0.5  # the bias's part of the Hessian is (I - 11'/C) / C
    v_C = ((torch.bincount(y_V, minlength=number) / count).log() / stretch).requires_grad_()
    rows_V = torch.arange(count, device=x_VM.device)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            weight_MC = torch.linalg.solve_triangular(factor_MM.T, u_MC, upper=True)
            logits_VC = torch.addmm(stretch * v_C, z_VM, weight_MC)
            logs_VC = logits_VC.log_softmax(dim=1)
            value = -logs_VC[rows_V, y_V].double().mean() + config.l2 / (2 * count) * weight_MC.double().square().sum()
            error_VC = logs_VC.exp_()
            error_VC[rows_V, y_V] -= 1
            gradient_MC = (z_VM.T @ error_VC + config.l2 * weight_MC) / count
            u_MC.grad = torch.linalg.solve_triangular(factor_MM, gradient_MC, upper=False).contiguous()
            v_C.grad = error_VC.sum(dim=0) * (stretch / count)
        return value

    optimizer = torch.optim.LBFGS(
        [u_MC, v_C],
        max_iter=config.iterations,
        tolerance_grad=config.tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)  # type: ignore[arg-type]
    weight_MC = torch.linalg.solve_triangular(factor_MM.T, u_MC.detach(), upper=True)
    return standard.fold(weight_MC.T.contiguous(), stretch * v_C.detach())


def _fit_ridge(x_VM: torch.Tensor, y_V: torch.Tensor, means_CM: torch.Tensor, config: FitConfig) -> Linear:
    standard = standardise(x_VM, per_coordinate=config.per_coordinate)
    targets_VC = torch.nn.functional.one_hot(y_V, len(means_CM)).float()
    share_C = targets_VC.mean(dim=0)
    gram_MM = (standard.z_VM.T @ standard.z_VM).double()
    gram_MM += config.l2 * torch.eye(len(gram_MM), device=x_VM.device)
    weight_MC = torch.linalg.solve(gram_MM, (standard.z_VM.T @ (targets_VC - share_C)).double()).float()
    return standard.fold(weight_MC.T.contiguous(), share_C)


def _fit_diff_means(x_VM: torch.Tensor, y_V: torch.Tensor, means_CM: torch.Tensor, config: FitConfig) -> Linear:
    # Relative to the mean of the means, which changes no answer and keeps the numbers small.
    middle_M = means_CM.mean(dim=0)
    weight_CM = means_CM - middle_M
    return Linear(weight_CM, -0.5 * weight_CM.square().sum(dim=1) - weight_CM @ middle_M)


def _fit_mass_mean(x_VM: torch.Tensor, y_V: torch.Tensor, means_CM: torch.Tensor, config: FitConfig) -> Linear:
    scatter_MM = torch.zeros(x_VM.shape[1], x_VM.shape[1], dtype=torch.float64, device=x_VM.device)
    for part_VM, part_V in zip(x_VM.split(8192), y_V.split(8192)):
        centred_VM = part_VM - means_CM[part_V]
        scatter_MM += (centred_VM.T @ centred_VM).double()
    covariance_MM = scatter_MM / len(x_VM)
    diagonal_MM = torch.diag(covariance_MM.diagonal().clamp_min(1e-12))
    covariance_MM = (1 - config.shrinkage) * covariance_MM + config.shrinkage * diagonal_MM
    middle_M = means_CM.mean(dim=0)
    offsets_CM = (means_CM - middle_M).double()
    weight_CM = torch.linalg.solve(covariance_MM, offsets_CM.T).T
    share_C = torch.bincount(y_V, minlength=len(means_CM)).double() / len(y_V)
    bias_C = share_C.log() - 0.5 * (weight_CM * offsets_CM).sum(dim=1) - weight_CM @ middle_M.double()
    return Linear(weight_CM.float(), bias_C.float())


_LINEAR: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, FitConfig], Linear]] = {
    "logistic": fit_logistic,
    "ridge": _fit_ridge,
    "diff_means": _fit_diff_means,
    "mass_mean": _fit_mass_mean,
}


def temperature(logits_VC: torch.Tensor, y_V: torch.Tensor) -> float:
    """The positive factor of these logits with the least cross-entropy, by bisection of its derivative."""
    logits_VC = logits_VC.double()
    logits_VC = logits_VC - logits_VC.max(dim=1, keepdim=True).values
    right_V = logits_VC.gather(1, y_V.unsqueeze(1)).squeeze(1)

    def slope(factor: float) -> float:
        return float(((logits_VC * factor).softmax(dim=1) * logits_VC).sum(dim=1).mean() - right_V.mean())

    low, high = -30.0, 30.0  # of the factor's logarithm; the loss is convex in the factor
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(torch.tensor(middle).exp().item()) < 0 else (low, middle)
    return float(torch.tensor((low + high) / 2).exp())


def _fit_mlp(x_VM: torch.Tensor, y_V: torch.Tensor, number: int, config: FitConfig) -> dict[str, torch.Tensor]:
    standard = standardise(x_VM)
    generator = torch.Generator().manual_seed(config.seed)
    width = x_VM.shape[1]

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5).to(x_VM.device).requires_grad_()

    inner_HM, outer_CH = draw(config.hidden, width), draw(number, config.hidden)
    inner_H = torch.zeros(config.hidden, device=x_VM.device, requires_grad=True)
    outer_C = torch.zeros(number, device=x_VM.device, requires_grad=True)
    parameters = [inner_HM, inner_H, outer_CH, outer_C]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    steps = config.epochs * -(-len(x_VM) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=max(steps, 2))
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x_VM), generator=generator).to(x_VM.device).split(config.batch_size):
            hidden = torch.relu(standard.z_VM[rows] @ inner_HM.T + inner_H)
            loss = torch.nn.functional.cross_entropy(hidden @ outer_CH.T + outer_C, y_V[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    folded = standard.fold(inner_HM.detach(), inner_H.detach())
    return {
        "hidden_weight_HM": folded.weight_CM,
        "hidden_bias_H": folded.bias_C,
        "weight_CM": outer_CH.detach(),
        "bias_C": outer_C.detach(),
    }
