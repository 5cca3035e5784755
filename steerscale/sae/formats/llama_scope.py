"""Llama Scope (2410.20526): hyperparams.json and checkpoints/final.safetensors.

Tensors: encoder.weight [n, d], encoder.bias [n], decoder.weight [d, n], decoder.bias [d].

Its SAEs see activations times sqrt(d_model) / their average norm, and may select by z times decoder norms; both are folded on
reading, in the authors' order, since their one threshold is in the units that come out of it.
"""

from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch

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

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_WEIGHTS_BESIDE = "final.safetensors"

_ACTIVATIONS = ("jumprelu", "topk", "relu")
_NORMS = "dataset_average_activation_norm"


def read(directory: Path, latents: slice | None) -> SAEWeights:
    """Read an SAE; see `Format.read`."""
    fields = Fields(directory / CONFIG)
    activation = fields.take("act_fn", str)
    if activation not in _ACTIVATIONS:
        raise fields.refuse("act_fn", activation, f"these are: {', '.join(_ACTIVATIONS)}")
    if fields.take("use_glu_encoder", bool, False):
        raise fields.refuse("use_glu_encoder", True, "only false is")
    scale_in, scale_out = _scales(fields)
    path = directory / WEIGHTS
    with open_safetensors(path if path.is_file() else directory / _WEIGHTS_BESIDE) as file:
        reader = LatentReader(file, latents, name="encoder.weight", axis=0)
        W_dec = reader.latents("decoder.weight", 1).T.contiguous() * (scale_in / scale_out)
        b_dec = torch.zeros(W_dec.shape[1])
        if fields.take("use_decoder_bias", bool, True):
            b_dec = reader.whole("decoder.bias") / scale_out
        W_enc, b_enc = reader.latents("encoder.weight").T, reader.latents("encoder.bias") / scale_in
    if fields.take("sparsity_include_decoder_norm", bool, False):
        norms = W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    hook, hook_out = fields.take("hook_point_in", str), fields.take("hook_point_out", str, "")
    threshold = fields.take("jump_relu_threshold", float) if activation == "jumprelu" else None
    return SAEWeights(
        architecture=activation,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=None if threshold is None else torch.full_like(b_enc, threshold),
        k=fields.take("top_k", int) if activation == "topk" else None,
        subtract_b_dec=fields.take("apply_decoder_bias_to_pre_encoder", bool, False),
        hook=hook,
        hook_out=hook_out if hook_out not in ("", hook) else None,
        **reader.position,
    )


def _scales(fields: Fields) -> tuple[float, float]:
    """What activations read, and those reconstructed, are multiplied by."""
    kind = fields.take("norm_activation", str, "dataset-wise")
    if kind in ("inference", "none"):  # folded already
        return 1.0, 1.0
    norms = fields.values.get(_NORMS)
    if kind != "dataset-wise":
        raise fields.refuse("norm_activation", kind, "only dataset-wise is: another depends on the activations")
    if not isinstance(norms, dict) or not all(_is_positive(norms.get(key)) for key in ("in", "out")):
        raise fields.refuse(_NORMS, norms, 'expected {"in": number, "out": number}, both positive')
    if (d_model := fields.take("d_model", int)) <= 0:
        raise fields.refuse("d_model", d_model, "a width is positive")
    width = sqrt(d_model)
    return width / norms["in"], width / norms["out"]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < inf


def write(weights: SAEWeights, directory: Path) -> None:
    """Write an SAE; see `Format.write`."""
    if weights.d_in != weights.d_out or weights.W_skip is not None:
        raise cannot_hold("llama_scope", weights, "it has one width and no skip path")
    weights = weights.fold_b_dec()
    threshold = weights.threshold
    if threshold is not None:
        weights = replace(weights, architecture="jumprelu", k=None)
        if float(threshold.min()) != float(threshold.max()):
            raise cannot_hold("llama_scope", weights, "it has one threshold for all latents")
    if weights.architecture not in _ACTIVATIONS:
        raise cannot_hold("llama_scope", weights, f"it is for {', '.join(_ACTIVATIONS)}")
    unit = sqrt(weights.d_in)  # the average norm that asks for no scaling
    config = {
        "hook_point_in": weights.hook or "",
        "hook_point_out": weights.hook_out or weights.hook or "",
        "act_fn": weights.architecture,
        "jump_relu_threshold": 0.0 if threshold is None else float(threshold[0]),
        "top_k": None if weights.k is None else int(weights.k),
        "d_model": weights.d_in,
        "d_sae": weights.num_latents,
        "expansion_factor": weights.num_latents / weights.d_in,
        "norm_activation": "dataset-wise",
        _NORMS: {"in": unit, "out": unit},
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": False,
        "use_glu_encoder": False,
    }
    write_json(config, directory / CONFIG)
    (directory / WEIGHTS).parent.mkdir()
    tensors = {
        "encoder.weight": weights.W_enc.T,
        "encoder.bias": weights.b_enc,
        "decoder.weight": weights.W_dec.T,
        "decoder.bias": weights.b_dec,
    }
    write_safetensors(tensors, directory / WEIGHTS)


LLAMA_SCOPE = Format(files=(CONFIG, f"{WEIGHTS}|{_WEIGHTS_BESIDE}"), read=read, write=write)
