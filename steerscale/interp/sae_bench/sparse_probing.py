"""Sparse probing: how much of a concept do one or a few latents of an SAE hold (Gurnee et al. 2023; SAEBench, Karvonen et al.)?

For each class against the rest: the k latents whose means differ most between the two, a logistic regression on them fitted and
tested on as many of each, its held-out accuracy; the same with k coordinates of the activation and with all of it (dense).

Shapes: V vectors, M d_model, N latents, K latents looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerscale.config import require
from steerscale.interp.probes.fit import FitConfig, class_means, fit_probe
from steerscale.interp.probes.run import ProbeTask
from steerscale.sae.weights import SAEWeights

CHUNK = 1024
"""Vectors whose latents are held at a time."""


@dataclass(frozen=True, kw_only=True)
class SparseProbing:
    """What was found about one class."""

    name: str
    """Of the class."""
    dense: float
    """Held-out accuracy with the whole activation; 0.5 is a guess."""
    sae: dict[int, float]
    """By k, with latents."""
    coordinates: dict[int, float]
    """By k, with coordinates of the activation."""
    latents: tuple[int, ...]
    """The most different first."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def chunks(sae: SAEWeights, x_VM: torch.Tensor) -> Iterator[torch.Tensor]:
    """Features [n, N] of activations, a part at a time."""
    for part_VM in x_VM.split(CHUNK):
        yield sae.encode(part_VM).float()


def latent_means(sae: SAEWeights, x_VM: torch.Tensor, y_V: torch.Tensor, number: int) -> torch.Tensor:
    """[C, N] mean of each latent in each class."""
    sums_CN = torch.zeros(number, sae.num_latents, device=x_VM.device)
    for f_VN, part_V in zip(chunks(sae, x_VM), y_V.split(CHUNK)):
        sums_CN.index_add_(0, part_V, f_VN)
    return sums_CN / torch.bincount(y_V, minlength=number).clamp_min(1).unsqueeze(1)


def others(means_CN: torch.Tensor, share_C: torch.Tensor) -> torch.Tensor:
    """[C, N] mean over the rest of the vectors for each class. `share_C`: how frequent the classes are."""
    whole_N = share_C @ means_CN
    return (whole_N - share_C.unsqueeze(1) * means_CN) / (1 - share_C.unsqueeze(1))


def distinctive_latents(
    sae: SAEWeights, x_VM: torch.Tensor, y_V: torch.Tensor, number: int, count: int, *, higher: bool = False
) -> torch.Tensor:
    """[C, count] latents whose means differ most between each class and the rest; `higher`: are largest above it."""
    means_CN = latent_means(sae, x_VM, y_V, number)
    apart_CN = means_CN - others(means_CN, torch.bincount(y_V, minlength=number) / len(y_V))
    return (apart_CN if higher else apart_CN.abs()).topk(count, dim=1).indices


def latent_columns(sae: SAEWeights, x_VM: torch.Tensor, latents: Sequence[int]) -> torch.Tensor:
    """[V, K] of these latents."""
    return torch.cat([f_VN[:, list(latents)] for f_VN in chunks(sae, x_VM)])


def balanced(y_V: torch.Tensor, of: int, *, seed: int) -> torch.Tensor:
    """Places of all examples of a class and as many of the rest, or of so many as there are, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.nonzero(y_V == of)[:, 0], torch.nonzero((y_V != of) & (y_V >= 0))[:, 0]]
    number = min(map(len, sides))
    return torch.cat([side[torch.randperm(len(side), generator=generator)[:number]] for side in sides])


def sparse_probing(
    sae: SAEWeights,
    x_VM: torch.Tensor,
    task: ProbeTask,
    *,
    ks: Sequence[int] = (1, 2, 5),
    fit: FitConfig | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SparseProbing]:
    """One record a class. `x_VM`: training, then held-out activations, as `collect` returns them for both.

    `fit.l2` is of the dense probe; on few columns it is 1.
    """
    most = min(sae.num_latents, x_VM.shape[1])
    require(
        all(0 < k <= most for k in ks) and len(ks) > 0,
        f"k must be from 1 to {most}, of {sae.num_latents} latents and {x_VM.shape[1]} coordinates, got {list(ks)}",
    )
    x = x_VM.split([len(task.train.y_V), len(task.test.y_V)])
    kept = task.train.y_V >= 0
    latents_CK = distinctive_latents(sae, x[0][kept], task.train.y_V[kept], len(task.classes), max(ks))
    columns = latent_columns(sae, x_VM, latents_CK.flatten().tolist()).split([len(part) for part in x])
    means_CM = class_means(x[0][kept], task.train.y_V[kept], len(task.classes))
    share_C = torch.bincount(task.train.y_V[kept]) / int(kept.sum())
    coordinates_CK = (means_CM - others(means_CM, share_C)).abs().topk(max(ks), dim=1).indices
    found = []
    for index, name in enumerate(task.classes):
        rows = [balanced(side.y_V, index, seed=seed) for side in task[1:3]]
        if all(map(len, rows)):
            y = [(side.y_V[chosen] == index).long() for side, chosen in zip(task[1:3], rows)]
            dense = [part[chosen] for part, chosen in zip(x, rows)]
            begin = index * max(ks)
            few = [part[chosen, begin : begin + max(ks)] for part, chosen in zip(columns, rows)]
            raw = [part[:, coordinates_CK[index]] for part in dense]
            found.append(
                SparseProbing(
                    name=name,
                    dense=accuracy(dense[0], y[0], dense[1], y[1], fit or FitConfig()),
                    sae={k: accuracy(few[0][:, :k], y[0], few[1][:, :k], y[1], FEW) for k in ks},
                    coordinates={k: accuracy(raw[0][:, :k], y[0], raw[1][:, :k], y[1], FEW) for k in ks},
                    latents=tuple(latents_CK[index].tolist()),
                )
            )
        on_progress(index + 1, len(task.classes))
    return found


FEW = FitConfig(l2=1.0)
"""For probes of a few columns."""


def accuracy(
    x_VM: torch.Tensor, y_V: torch.Tensor, test_VM: torch.Tensor, test_V: torch.Tensor, fit: FitConfig
) -> float:
    """Held-out accuracy of a logistic regression of two classes."""
    probe = fit_probe(x_VM, y_V, ("rest", "class"), hook="-", kind="logistic", config=fit)
    return float((probe.logits(test_VM).argmax(dim=1) == test_V).double().mean())
