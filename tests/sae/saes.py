"""Small random SAEs of every architecture."""

import torch

from steerscale.sae.weights import SAEWeights

D_IN, N = 8, 24


def random_sae(architecture: str, *, seed: int = 0, d_out: int = D_IN, k: float = 4) -> SAEWeights:
    """An SAE whose latents fire on about half of N(0, 1) vectors, or less with thresholds; decoder norms all differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    tensors: dict[str, torch.Tensor] = {
        "W_enc": normal(D_IN, N, std=D_IN**-0.5),
        "W_dec": normal(N, d_out),
        "b_dec": normal(d_out, std=0.3),
    }
    if architecture == "gated":
        tensors |= {"b_gate": normal(N, std=0.3), "r_mag": normal(N, std=0.5), "b_mag": normal(N, std=0.3)}
    else:
        tensors["b_enc"] = normal(N, std=0.3)
    if architecture in ("jumprelu", "batch_topk", "matryoshka"):
        tensors["threshold"] = normal(N).abs() + 0.05
    return SAEWeights(
        architecture=architecture,
        **tensors,
        k=k if "top" in architecture or architecture == "matryoshka" else None,
        subtract_b_dec=d_out == D_IN,
        hook="blocks.3.hook_resid_post",
        hook_out=None if d_out == D_IN else "blocks.3.hook_mlp_out",
        model="gpt2-small",
    )
