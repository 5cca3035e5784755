"""Spurious correlation removal (SHIFT, Marks et al. 2024; SCR of SAEBench, Karvonen et al. 2025).

Texts have a label and a spurious attribute. A probe for the label is fitted where both always agree, so it leans on the
attribute. Then the latents that carry the attribute are ablated: does the probe, unchanged, get the label right where the two
are independent? With a(n) its accuracy there when n latents are ablated, and b that of a probe fitted on balanced text:

    score(n) = (a(n) - a(0)) / (b - a(0))

Latents are ranked by (difference of their means between the attribute's values) x (decoder row along the attribute's probe). A
text is the mean of its tokens; an ablated latent has its mean over balanced text instead of its value: a delta, errors stay.
(Zeros, as in SAEBench, move the probe to one side where only one of the attribute's values has a latent.)

Shapes: T tokens, V texts, M d_model, N latents.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerscale.errors import DataError
from steerscale.interp.probes.edit import direction
from steerscale.interp.probes.fit import FitConfig, fit_probe
from steerscale.interp.probes.probe import Probe
from steerscale.interp.sae_bench.sparse_probing import chunks
from steerscale.sae.weights import SAEWeights

MIN_TEXTS = 20
"""Of each of the four combinations, on either side of the split."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was found in one direction: the label is kept, the spurious attribute's latents are ablated."""

    label: str
    before: float
    """Held-out accuracy of the biased probe on balanced text."""
    oracle: float
    """Of a probe fitted on balanced text."""
    spurious: float
    """The share of balanced held-out text on which the biased probe's answer is the spurious attribute."""
    after: dict[int, float]
    """Accuracy of the biased probe by the number of latents ablated."""
    score: dict[int, float]
    """By that number: 0 no effect, 1 as good as the oracle, negative worse than before."""
    latents: tuple[int, ...]
    """Those ablated, the strongest first."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def spurious_removal(
    sae: SAEWeights,
    x_TM: torch.Tensor,
    texts_T: torch.Tensor,
    label_V: torch.Tensor,
    spurious_V: torch.Tensor,
    *,
    name: str,
    numbers: Sequence[int] = (2, 5, 10, 20, 50),
    fit: FitConfig | None = None,
) -> Removal:
    """Every second text of each combination of `label_V` and `spurious_V` (0 or 1) is held out.

    Args:
        x_TM: activations of all tokens that count; texts_T: the text each belongs to.
    Raises DataError if a combination has too few texts.
    """
    fit, number = fit or FitConfig(per_coordinate=False), len(label_V)
    cells = [torch.nonzero((label_V == label) & (spurious_V == value))[:, 0] for label in (0, 1) for value in (0, 1)]
    size = min(map(len, cells)) // 2
    if size < MIN_TEXTS:
        raise DataError(
            f"{2 * MIN_TEXTS} texts or more are needed of each combination of label and spurious attribute, got "
            f"{[len(cell) for cell in cells]}"
        )
    train, test = (torch.cat([cell[begin::2][:size] for cell in cells]) for begin in (0, 1))
    agree = train[label_V[train] == spurious_V[train]]
    count_V1 = torch.bincount(texts_T, minlength=number).clamp_min(1).unsqueeze(1)
    x_VM = torch.zeros(number, x_TM.shape[1], device=x_TM.device).index_add_(0, texts_T, x_TM.float()) / count_V1

    def probe_of(rows: torch.Tensor, y_V: torch.Tensor) -> Probe:
        return fit_probe(x_VM[rows], y_V[rows], ("0", "1"), hook="-", kind="logistic", config=fit)

    biased, oracle, attribute = probe_of(agree, label_V), probe_of(train, label_V), probe_of(train, spurious_V)
    f_VN = _pooled(sae, x_TM, texts_T, number) / count_V1
    rows_NM = sae.W_dec.float() / (sae.input_scale if sae.output_scale is None else sae.output_scale)
    apart_N = f_VN[train][spurious_V[train] == 1].mean(dim=0) - f_VN[train][spurious_V[train] == 0].mean(dim=0)
    effect_N = apart_N * (rows_NM @ direction(attribute, 1, 0))
    latents = effect_N.topk(min(max(numbers), len(effect_N))).indices

    def right(probe: Probe, vectors_VM: torch.Tensor, y_V: torch.Tensor) -> float:
        return float((probe.logits(vectors_VM).argmax(dim=1) == y_V[test]).double().mean())

    before, best = right(biased, x_VM[test], label_V), right(oracle, x_VM[test], label_V)
    after = {}
    for many in numbers:
        chosen = latents[:many]
        excess_VN = f_VN[test][:, chosen] - f_VN[train][:, chosen].mean(dim=0)
        without_VM = x_VM[test] - excess_VN @ rows_NM[chosen]
        after[many] = right(biased, without_VM, label_V)
    gap = best - before
    return Removal(
        label=name,
        before=before,
        oracle=best,
        spurious=right(biased, x_VM[test], spurious_V),
        after=after,
        score={many: (value - before) / gap if gap > 0 else 0.0 for many, value in after.items()},
        latents=tuple(latents.tolist()),
    )


def _pooled(sae: SAEWeights, x_TM: torch.Tensor, texts_T: torch.Tensor, number: int) -> torch.Tensor:
    """[V, N] sums of each latent over a text's tokens."""
    sums_VN = torch.zeros(number, sae.num_latents, device=x_TM.device)
    begin = 0
    for f_TN in chunks(sae, x_TM):
        sums_VN.index_add_(0, texts_T[begin : begin + len(f_TN)], f_TN)
        begin += len(f_TN)
    return sums_VN
