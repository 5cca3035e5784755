"""eai-sparsify: TopK SAEs and transcoders in cfg.json and sae.safetensors.

Tensors: encoder.weight [n, d], encoder.bias [n], W_dec [n, d], b_dec [d], and W_skip [d, d], transposed to ours. The hook is
the directory's name (layers.5, layers.5.mlp); the model is named in config.json above it.
"""

import re
from pathlib import Path

from steerscale.sae.formats.base import (
    Fields,
    Format,
    LatentReader,
    cannot_hold,
    open_safetensors,
    write_json,
    write_safetensors,
)
from steerscale.sae.weights import SAEWeights

CONFIG, WEIGHTS, RUN_CONFIG = "cfg.json", "sae.safetensors", "config.json"


def read(directory: Path, latents: slice | None) -> SAEWeights:
    """Read an SAE; see `Format.read`."""
    fields = Fields(directory / CONFIG)
    activation = fields.take("activation", str, "topk")
    if activation != "topk":
        raise fields.refuse("activation", activation, "only topk is")
    if fields.take("signed", bool, False):
        raise fields.refuse("signed", True, "only false is")
    with open_safetensors(directory / WEIGHTS) as file:
        reader = LatentReader(file, latents, name="encoder.weight", axis=0)
        return SAEWeights(
            architecture="topk",
            W_enc=reader.latents("encoder.weight").T,
            W_dec=reader.latents("W_dec"),
            b_enc=reader.latents("encoder.bias"),
            b_dec=reader.whole("b_dec"),
            W_skip=reader.whole("W_skip").T if "W_skip" in reader.names else None,
            k=fields.take("k", int),
            subtract_b_dec=not fields.take("transcode", bool, False),
            hook=_hook(directory.absolute().name),
            model=_model(directory),
            **reader.position,
        )


def write(weights: SAEWeights, directory: Path) -> None:
    """Write an SAE; see `Format.write`."""
    if weights.architecture != "topk" or weights.k is None:
        raise cannot_hold("sparsify", weights, "it is for TopK")
    if weights.d_in != weights.d_out:
        raise cannot_hold("sparsify", weights, f"its d_out is its d_in, here {weights.d_out} and {weights.d_in}")
    config = {
        "activation": "topk",
        "d_in": weights.d_in,
        "num_latents": weights.num_latents,
        "expansion_factor": -(-weights.num_latents // weights.d_in),
        "k": int(weights.k),
        "normalize_decoder": not weights.hook_out,
        "multi_topk": False,
        "skip_connection": weights.W_skip is not None,
        "transcode": not weights.subtract_b_dec,  # what it means for the encoder
    }
    write_json(config, directory / CONFIG)
    tensors = {
        "encoder.weight": weights.W_enc.T,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
        "W_skip": None if weights.W_skip is None else weights.W_skip.T,
    }
    write_safetensors(tensors, directory / WEIGHTS)


def _hook(name: str) -> str | None:
    """The hook of a directory named by a module path."""
    if name == "embed_tokens":
        return "hook_embed"
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?", name)
    return found and f"blocks.{found[1]}.{'hook_mlp_out' if found[2] else 'hook_resid_post'}"


def _model(directory: Path) -> str | None:
    path = directory.parent / RUN_CONFIG
    return Fields(path).take("model", str, "") or None if path.is_file() else None


SPARSIFY = Format(files=(CONFIG, WEIGHTS), read=read, write=write)
