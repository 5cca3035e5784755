"""Pictures of an SAE: how often its latents are active, how their directions lie to each other."""

from collections.abc import Mapping
from pathlib import Path

import torch

from steerscale.sae.base import SparseAutoencoder

MOST_ROWS = 2048
"""Decoder rows whose nearest neighbour is looked for, among all rows."""


def plot_sae(
    path: Path, sae: SparseAutoencoder, frequency_n: torch.Tensor, values: Mapping[str, float], *, title: str
) -> None:
    """Write a PNG with feature density, nearest neighbours of decoder rows, and the figures of an evaluation.

    Args:
        sae: of one process, all latents.
        frequency_n: share of the vectors that activate each latent.
    """
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    picture = Figure(figsize=(12, 3.6), layout="constrained", dpi=110)
    density, neighbours, text = picture.subplots(1, 3, gridspec_kw={"width_ratios": [2, 2, 1.1]})
    active = frequency_n[frequency_n > 0].log10().cpu().numpy()
    density.hist(active, bins=50, color="tab:blue")
    density.set(title="feature density", xlabel="log10 share of vectors", ylabel="latents")
    density.annotate(
        f"{(frequency_n == 0).sum():,} of {len(frequency_n):,} never active",
        (0.02, 0.94),
        xycoords="axes fraction",
        fontsize=8,
    )
    neighbours.hist(nearest_cosines(sae.W_dec).cpu().numpy(), bins=50, color="tab:green")
    neighbours.set(title="nearest decoder row", xlabel="largest cosine to another row", ylabel="latents")
    text.axis("off")
    lines = [f"{name.replace('_', ' ')}  {value:,.4g}" for name, value in values.items()]
    text.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8)
    picture.suptitle(title.replace("$", r"\$"))
    picture.savefig(path)


@torch.no_grad()
def nearest_cosines(W_dec_nd: torch.Tensor) -> torch.Tensor:
    """[m] largest cosine of m <= `MOST_ROWS` evenly spaced rows to any other row."""
    rows = W_dec_nd / W_dec_nd.norm(dim=1, keepdim=True).clamp_min(1e-30)
    chosen = torch.arange(0, len(rows), max(len(rows) // MOST_ROWS, 1), device=rows.device)[:MOST_ROWS]
    cosines = rows[chosen] @ rows.T
    cosines[torch.arange(len(chosen), device=rows.device), chosen] = -1
    return cosines.max(dim=1).values
