"""Which latents of two SAEs point the same way? Matching of decoder directions.

Shapes: N latents of one, P of the other.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerscale.config import require
from steerscale.sae.weights import SAEWeights

ALIKE = 0.7
"""Cosine from which two directions count as found again (Paulo, Belrose 2025)."""
CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How the directions of two SAEs lie to each other."""

    mean_first: float
    """Mean over the first's latents of the largest cosine to one of the second's."""
    mean_second: float
    """The other way round."""
    found_first: float
    """Share of the first's latents that the second has, with a cosine of at least ALIKE."""
    found_second: float
    """The other way round."""
    mutual: int
    """Pairs that are each other's nearest, at least that near."""
    pairs: tuple[tuple[int, int, float], ...]
    """The nearest of those: (latent of the first, of the second, cosine)."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def match_decoders(first: SAEWeights, second: SAEWeights, *, pairs: int = 20) -> Matching:
    """Compare every direction with every other. Raises ConfigError for SAEs of activations of other widths."""
    require(
        first.d_out == second.d_out, f"SAEs of activations of widths {first.d_out} and {second.d_out} cannot be matched"
    )
    rows_NM, rows_PM = (
        sae.W_dec.float() / sae.W_dec.float().norm(dim=1, keepdim=True).clamp_min(1e-30) for sae in (first, second)
    )
    best_P, of_P = torch.full((len(rows_PM),), -1.0), torch.zeros(len(rows_PM), dtype=torch.int64)
    best_N, of_N = [], []
    for number, part_NM in enumerate(rows_NM.split(CHUNK)):
        cosines = (part_NM @ rows_PM.T).cpu()
        found = cosines.max(dim=1)
        best_N.append(found.values)
        of_N.append(found.indices)
        other = cosines.max(dim=0)
        better = other.values > best_P
        best_P = torch.where(better, other.values, best_P)
        of_P = torch.where(better, other.indices + number * CHUNK, of_P)
    cosine_N, index_N = torch.cat(best_N), torch.cat(of_N)
    mutual_N = (of_P[index_N] == torch.arange(len(index_N))) & (cosine_N >= ALIKE)
    order = torch.where(mutual_N, cosine_N, -2).argsort(descending=True)[: min(pairs, int(mutual_N.sum()))]
    return Matching(
        mean_first=float(cosine_N.mean()),
        mean_second=float(best_P.mean()),
        found_first=float((cosine_N >= ALIKE).double().mean()),
        found_second=float((best_P >= ALIKE).double().mean()),
        mutual=int(mutual_N.sum()),
        pairs=tuple((row, int(index_N[row]), float(cosine_N[row])) for row in order.tolist()),
    )
