"""Initial weights of an SAE, equal on every layout, and what is taken from the data: scales, mean, b_dec."""

import math

import torch
import torch.distributed as dist

from steerscale.parallel.shards import seed_of
from steerscale.sae.base import SparseAutoencoder, normalize_rows

MEDIAN_ITERATIONS = 100
MEDIAN_TOLERANCE = 1e-6


@torch.no_grad()
def draw_weights(sae: SparseAutoencoder, *, seed: int) -> None:
    """Decoder rows in uniformly random directions with norm 1, the encoder their transpose times `encoder_scale` where widths
    allow; biases 0.

    Drawn whole and cut, from the seed and the SAE's name: the same on every layout. A whole matrix must fit once beside the
    shard.
    """
    spec, size, rank = sae.spec, sae.context.layout.tensor, sae.context.at.tensor
    tied = spec.config.tied_init and spec.d_in == spec.d_out
    for name in ("W_dec",) if tied else ("W_dec", "W_enc"):
        parameter = getattr(sae, name)
        generator = torch.Generator(device=parameter.device).manual_seed(seed_of(seed, f"{spec.name}.{name}"))
        whole = torch.empty(spec.width, parameter.shape[1], device=parameter.device)
        whole.normal_(generator=generator)
        parameter.copy_(whole.chunk(size)[rank])
        normalize_rows(parameter)
    if tied:
        sae.W_enc.copy_(sae.W_dec)
    else:  # an encoder as long as its input is wide: pre-activations of the size of the input
        sae.W_enc.mul_(math.sqrt(spec.d_in / spec.width) if spec.width > spec.d_in else 1.0)
    sae.W_enc.mul_(spec.config.encoder_scale)


@torch.no_grad()
def initialize_from_data(sae: SparseAutoencoder, input_Bd: torch.Tensor, target_Bd: torch.Tensor) -> None:
    """Set scales, mean and b_dec by the first vectors of all replicas (gathered here: B d elements from each of them).

    Every rank computes the same numbers from the same rows, whatever the layout. Vectors that are not finite are left out: they
    cost this step, and must not cost all that follow.
    """
    inputs, targets = _gather(sae, input_Bd), _gather(sae, target_Bd)
    finite_B = inputs.isfinite().all(dim=1) & targets.isfinite().all(dim=1)
    if finite_B.any():
        inputs, targets = inputs[finite_B], targets[finite_B]
    kind = sae.spec.config.normalize
    sae.scales.input.copy_(_scale(inputs, kind))
    sae.scales.output.copy_(_scale(targets, kind))
    targets = targets * sae.scales.output
    sae.scales.mean.copy_(targets.mean(0))
    if sae.spec.config.b_dec_init == "mean":
        sae.b_dec.copy_(sae.scales.mean)
    elif sae.spec.config.b_dec_init == "geometric_median":
        sae.b_dec.copy_(geometric_median(targets))


def _scale(x_Bd: torch.Tensor, kind: str) -> torch.Tensor:
    wanted = {"none": None, "unit": 1.0, "width": float(x_Bd.shape[1])}[kind]
    if wanted is None:
        return torch.ones((), device=x_Bd.device)
    return (wanted / x_Bd.square().sum(1).mean().clamp_min(1e-30)).sqrt()


def _gather(sae: SparseAutoencoder, x_Bd: torch.Tensor) -> torch.Tensor:
    x_Bd = x_Bd.float().contiguous()
    if sae.replicas is None:
        return x_Bd
    parts = [torch.empty_like(x_Bd) for _ in range(sae.context.layout.data)]
    dist.all_gather(parts, x_Bd, group=sae.replicas)
    return torch.cat(parts)


def geometric_median(x_Bd: torch.Tensor) -> torch.Tensor:
    """[d] point with the least sum of distances to the rows: Weiszfeld's iteration, steps that land on a row included.

    Vardi and Zhang 2000: a row that the iteration stands on pulls with weight 1 and no direction.
    """
    x = x_Bd.double()
    median = x.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        distances = torch.linalg.vector_norm(x - median, dim=1)
        on = distances < 1e-12 * distances.max()
        weights = torch.where(on, 0.0, 1 / distances.clamp_min(1e-300))
        target = weights @ x / weights.sum()
        pull = torch.linalg.vector_norm(weights @ (x - median))
        share = (on.sum() / pull).clamp(max=1.0) if on.any() and pull > 0 else torch.zeros(())
        step = (1 - share) * (target - median)
        median = median + step
        if torch.linalg.vector_norm(step) <= MEDIAN_TOLERANCE * distances.mean():
            break
    return median.to(x_Bd.dtype)
