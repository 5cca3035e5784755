"""One step's loss and gradients against the papers' formulas, written down densely and left to autograd in float64.

x [B, d_in] input, y [B, d_out] target, both as the encoder and the loss see them (scaled); n latents, rows of W_enc and W_dec
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.config import SAEConfig, SAESpec
from steerscale.sae.initial import geometric_median
from steerscale.testing.ranks import RankPool

B, D, N = 24, 12, 32
DEAD = torch.arange(N) % 4 == 1
CLOSE = 2e-5
"""Largest difference of float32 from float64, as a share of the largest element."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An SAE's settings, and the hook points it reads and reconstructs, each of width D."""

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("a",)
    outputs: tuple[str, ...] = ("a",)

    @property
    def spec(self) -> SAESpec:
        defaults: dict[str, Any] = {"k": 4, "aux_k": 3, "dead_after": B, "prefixes": [0.25, 0.5, 1.0], "sparsity": 0.3}
        config = SAEConfig(
            hooks=list(self.inputs),
            targets=None if self.inputs == self.outputs else list(self.outputs),
            crosscoder=len(self.inputs) > 1,
            architecture=self.architecture,  # type: ignore[arg-type]
            bandwidth=0.3,
            **{**defaults, **self.settings},
        )
        return SAESpec(
            name="sae",
            inputs=self.inputs,
            outputs=self.outputs,
            d_in=D * len(self.inputs),
            d_out=D * len(self.outputs),
            width=N,
            config=config,
        )


CASES = {
    **{name: Case(name) for name in ARCHITECTURES},
    "relu, free norms": Case("relu", {"unit_norm_decoder": False}),
    "gated, free norms": Case("gated", {"unit_norm_decoder": False}),
    "jumprelu, free norms": Case("jumprelu", {"unit_norm_decoder": False}),
    "topk, b_dec not subtracted": Case("topk", {"subtract_b_dec": False}),
    "gated, b_dec not subtracted": Case("gated", {"subtract_b_dec": False}),
    "topk transcoder": Case("topk", outputs=("b",)),
    "jumprelu transcoder": Case("jumprelu", outputs=("b",)),
    "batch_topk crosscoder": Case("batch_topk", inputs=("a", "b"), outputs=("a", "b")),
    "relu crosscoder": Case("relu", {"unit_norm_decoder": False}, inputs=("a", "b"), outputs=("a", "b")),
    "topk without AuxK": Case("topk", {"aux_k": 0}),
}


def _tensors(case: Case) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """Weights, raw input and raw target: all different from what training begins with."""
    generator = torch.Generator().manual_seed(len(str(case)))

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    spec = case.spec
    tensors = {
        "W_enc": normal(N, spec.d_in, std=spec.d_in**-0.5),
        "W_dec": normal(N, spec.d_out, std=spec.d_out**-0.5),
        "b_enc": normal(N, std=0.3),
        "b_dec": normal(spec.d_out, std=0.3),
    }
    if spec.config.unit_norm_decoder:
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    if case.architecture == "gated":
        tensors |= {"r_mag": normal(N, std=0.5), "b_mag": normal(N, std=0.3)}
    if case.architecture == "jumprelu":
        tensors["threshold"] = normal(N, std=0.3).abs() + 0.2  # above half the window
    x = normal(B, spec.d_in)
    return tensors, x, normal(B, spec.d_out) if spec.is_transcoder else x


def one_step(case: Case, layout: ParallelLayout) -> tuple[Tensors, float, list[float]]:
    """This rank's gradients, the loss and what is reported. For `RankPool.run`."""
    tensors, x, y = _tensors(case)
    spec = case.spec
    with initialize(layout) as context:
        sae = ARCHITECTURES[case.architecture](spec, context)
        for shard, parameter in sae.shards():
            whole = tensors[shard.name.removeprefix("sae.")]
            parts = whole.chunk(layout.tensor if shard.dim == 0 else 1)
            parameter.data.copy_(parts[context.at.tensor if shard.dim == 0 else 0])
        sae.unused_steps.copy_(DEAD.float().chunk(layout.tensor)[context.at.tensor])
        sae.count_dead()
        sae.scales.input.fill_(0.7)
        sae.scales.output.fill_(1.3 if spec.is_transcoder else 0.7)
        sae.before_step(0)
        losses = sae(x, y)
        losses.total.backward()
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        return gradients, float(losses.complete), losses.reported.tolist()


def _reference(case: Case) -> tuple[Tensors, float, dict[str, float]]:
    """Gradients, loss, and what of it is known by a name."""
    tensors, x, y = _tensors(case)
    config, spec = case.spec.config, case.spec
    p = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    x, y = x.double() * 0.7, y.double() * (1.3 if spec.is_transcoder else 0.7)
    W_enc, W_dec, b_dec = p["W_enc"], p["W_dec"], p["b_dec"]
    centred = x - b_dec if config.subtract_b_dec and not spec.is_transcoder else x
    z = centred @ W_enc.T + p["b_enc"]
    # sum over hook points of the norms of a latent's decoder rows (crosscoders: Lindsey et al. 2024)
    norms = W_dec.unflatten(1, (len(spec.outputs), -1)).norm(dim=2).sum(1)
    norms = torch.ones(N).double() if config.unit_norm_decoder else norms
    found: dict[str, float] = {}

    def error(f: torch.Tensor) -> torch.Tensor:
        return (f @ W_dec + b_dec - y).square().sum()

    if case.architecture == "relu":  # 2309.08600, section 3.2, each latent's share by its row's norm
        f = z.relu()
        total = error(f) + config.sparsity * (f * norms).sum()
    elif case.architecture == "gated":  # 2404.16014, equations 5 to 8
        pi = z
        gate = (pi > 0).double()
        f = gate * (p["r_mag"].exp() * (centred @ W_enc.T) + p["b_mag"]).relu()
        frozen = (pi.relu() @ W_dec.detach() + b_dec.detach() - y).square().sum()
        total = error(f) + config.sparsity * (pi.relu() * norms.detach()).sum() + frozen
        found["aux_error"] = float(frozen.detach())
    elif case.architecture == "jumprelu":  # 2407.14435, equations 9 to 12
        theta, width = p["threshold"], config.bandwidth
        active, window = (z > theta).double(), ((z - theta).abs() < width / 2).double()
        moved = theta - theta.detach()  # 0, with a derivative of 1
        f = z * active - moved * (theta / width * window).detach()
        total = error(f) + config.sparsity * (active - moved * window / width).sum()
        f = z * active
    else:
        f = z.relu() * _selected(case.architecture, z.detach(), config.k)
        ends = [round(share * N) for share in config.prefixes] if case.architecture == "matryoshka" else [N]
        prefixes = [f * (torch.arange(N) < end) for end in ends]  # 2503.17547, equation 5, as a mean
        total = torch.stack([error(prefix) for prefix in prefixes]).mean()
        if config.aux_k != 0:  # 2406.04093, appendix A.2
            missing = (y - f @ W_dec - b_dec).detach()
            dead = z.masked_fill(~DEAD, -torch.inf)
            chosen = torch.zeros_like(z).scatter(1, dead.topk(spec.aux_k).indices, 1.0)
            said = (z.relu() * chosen) @ W_dec
            share = (said - missing).square().sum(1) / missing.square().sum(1)
            total = total + config.aux_coefficient * share.sum()
            found["aux_error"] = float(config.aux_coefficient * share.detach().sum())
    total.backward()
    gradients = {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None}
    if config.unit_norm_decoder:
        along = (gradients["W_dec"] * W_dec).sum(1, keepdim=True)
        gradients["W_dec"] = gradients["W_dec"] - along * W_dec.detach()
    found |= {"squared_error": float(error(f.detach()).detach()), "l0": float((f > 0).sum())}
    return gradients, float(total.detach()), found


def _selected(architecture: str, z: torch.Tensor, k: int) -> torch.Tensor:
    if architecture == "topk":
        return torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    return (z >= z.flatten().topk(k * B).values[-1]).double()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_the_formulas(name: str, tensor: int, pool: RankPool) -> None:
    case = CASES[name]
    expected, loss, found = _reference(case)
    ranks = pool.run(one_step, case, ParallelLayout(tensor=tensor, micro_batch_size=B), ranks=tensor)
    for gradients, total, reported in ranks:
        assert total == pytest.approx(loss, rel=1e-5)
        squared_error, _, l0, _, aux_error = reported
        assert squared_error == pytest.approx(found["squared_error"], rel=1e-5)
        assert l0 == found["l0"]
        assert aux_error == pytest.approx(found.get("aux_error", 0.0), rel=1e-5)
        assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        parts = [gradients[key].double() for gradients, _, _ in ranks]
        got = [torch.cat(parts)] if key != "b_dec" else parts
        for one in got:
            assert gradient.abs().max() > 0
            assert (one - gradient).abs().max() <= CLOSE * gradient.abs().max(), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_gradient_is_orthogonal_to_unit_rows(architecture: str, pool: RankPool) -> None:
    case = Case(architecture)
    ((gradients, _, _),) = pool.run(one_step, case, ParallelLayout(micro_batch_size=B), ranks=1)
    W_dec, gradient = _tensors(case)[0]["W_dec"], gradients["W_dec"]
    along = (gradient * W_dec).sum(1).abs()
    assert gradient.norm(dim=1).max() > 0.1
    assert along.max() <= 1e-5 * gradient.norm(dim=1).max()


@pytest.mark.parametrize("rows", [3, 7, 100])
def test_geometric_median_is_where_the_sum_of_distances_is_least(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64) ** 3  # skewed: far from the mean
    found = geometric_median(x).numpy()

    def distances(point: np.ndarray) -> float:
        return float(np.linalg.norm(x.numpy() - point, axis=1).sum())

    best = minimize(distances, x.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12})
    assert distances(found) <= best.fun * (1 + 1e-6)
    np.testing.assert_allclose(found, best.x, atol=1e-3)
    assert np.linalg.norm(found - x.mean(0).numpy()) > 0.01


@pytest.mark.parametrize(
    ("x", "median"),
    [
        ([[0.0, 0.0], [1, 0], [-1, 0], [0, 1], [0, -1]], [0.0, 0.0]),  # begins on a row, and has to stay
        ([[0.0, 0.0], [0, 0], [0, 0], [1, 0], [0, 1]], [0.0, 0.0]),  # most rows are one point
        ([[0.0], [1], [10]], [1.0]),
        ([[2.0, 3.0]], [2.0, 3.0]),
        ([[2.0, 3.0]] * 4, [2.0, 3.0]),
        ([[0.0, 0.0], [3, 0], [-3, 0], [0, 0]], [0.0, 0.0]),
        # Begins on a row that is not the median: it has to leave.
        ([[0.0, 0.0], [1, 0], [1, 0.1], [1, -0.1], [1, 0], [-4, 0]], [1.0, 0.0]),
    ],
)
def test_geometric_median_on_a_row(x: list[list[float]], median: list[float]) -> None:
    np.testing.assert_allclose(geometric_median(torch.tensor(x)).numpy(), median, atol=2e-3)
