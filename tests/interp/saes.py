"""SAEs to steer with, made up: they need no training to be wrong or right."""

import torch

from steerscale.sae.weights import SAEWeights

HOOK = "blocks.1.hook_resid_post"


def random_sae(width: int, architecture: str = "relu", *, latents: int = 96, hook: str = HOOK) -> SAEWeights:
    """Reconstructs badly; scales are not 1."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return SAEWeights(
        architecture=architecture,
        W_enc=draw(width, latents),
        W_dec=draw(latents, width),
        b_dec=draw(width),
        b_enc=draw(latents),
        threshold=draw(latents).abs() if architecture == "jumprelu" else None,
        k=12 if architecture == "topk" else None,
        input_scale=1.7,
        hook=hook,
    )


def perfect_sae(width: int) -> SAEWeights:
    """A latent for each sign of each coordinate: nothing is lost."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return SAEWeights(
        architecture="relu",
        W_enc=both.T.contiguous(),
        W_dec=both,
        b_dec=torch.zeros(width),
        b_enc=torch.zeros(2 * width),
        hook=HOOK,
    )


def silent_sae(width: int) -> SAEWeights:
    """No latent is ever active: everything is lost."""
    sae = perfect_sae(width)
    assert sae.b_enc is not None
    sae.b_enc.fill_(-1e6)
    return sae
