"""SAELens, versions 6 (nested metadata) and, read only, before (flat): cfg.json and sae_weights.safetensors.

Read: its inference SAEs and transcoders, and the training SAEs in its checkpoints. Written: its inference classes, so
batch_topk and matryoshka become jumprelu SAEs that say in their metadata what they were trained as (SAELens does the same).
"""

from pathlib import Path
from typing import Any

import torch

from steerscale.errors import CheckpointError
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

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

SCHEMA = "6.0.0"
"""The version of SAELens that introduced the form written here; it takes files that name none for older ones."""

_ARCHITECTURES = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_TRAINED_AS = {"batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}

_FLAT_METADATA = {
    *(
        "model_name",
        "hook_name",
        "hook_name_out",
        "hook_head_index",
        "model_class_name",
        "model_from_pretrained_kwargs",
    ),
    *("prepend_bos", "context_size", "dataset_path", "neuronpedia_id", "seqpos_slice", "exclude_special_tokens"),
    *("sae_lens_version", "sae_lens_training_version", "reshape_activations"),
}


def read(directory: Path, latents: slice | None) -> SAEWeights:
    """Read an SAE; see `Format.read`."""
    fields = Fields(directory / CONFIG)
    metadata = _metadata(fields)
    name = _architecture(fields)
    if name not in _ARCHITECTURES:
        raise fields.refuse("architecture", name, f"these are: {', '.join(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[name]
    if name == "jumprelu":
        trained = metadata.get("training_architecture")
        architecture = next((ours for ours, theirs in _TRAINED_AS.items() if theirs == trained), architecture)
    is_transcoder = name.endswith("transcoder")
    if fields.take("finetuning_scaling_factor", bool, False):
        raise fields.refuse("finetuning_scaling_factor", True, "fold it in SAELens first")
    with open_safetensors(directory / WEIGHTS) as file:
        reader = LatentReader(file, latents, name="W_enc", axis=1)
        rescale = fields.take("rescale_acts_by_decoder_norm", bool, False)
        if rescale and architecture == "gated":
            raise fields.refuse("rescale_acts_by_decoder_norm", True, "a gated SAE has no such thing")
        tensors = _tensors(reader, architecture, rescale=rescale)
    return SAEWeights(
        architecture=architecture,
        **tensors,
        k=_k(fields, metadata) if architecture in ("topk", *_TRAINED_AS) else None,
        subtract_b_dec=not is_transcoder and fields.take("apply_b_dec_to_input", bool, True),
        input_scale=_input_scale(fields, directory),
        hook=_name_in(metadata, "hook_name", fields),
        hook_out=_name_in(metadata, "hook_name_out", fields) if is_transcoder else None,
        model=_name_in(metadata, "model_name", fields),
        metadata=metadata,
        **reader.position,
    )


def _metadata(fields: Fields) -> dict[str, Any]:
    values = fields.values
    if isinstance(values.get("metadata"), dict):
        metadata = dict(values["metadata"])
    else:
        metadata = {key: value for key, value in values.items() if key in _FLAT_METADATA}
        metadata.setdefault("hook_name", values.get("hook_point"))
    if values.get("reshape_activations") not in (None, "none"):
        metadata["reshape_activations"] = values["reshape_activations"]
    return metadata


def _name_in(metadata: dict[str, Any], key: str, fields: Fields) -> str | None:
    """A name out of the metadata, where it does not stay."""
    name = metadata.pop(key, None)
    if name is not None and not isinstance(name, str):
        raise fields.refuse(key, name, "a name is")
    return name


def _k(fields: Fields, metadata: dict[str, Any]) -> float | None:
    """k by one of the places it has had; None: it is not said."""
    details = metadata.get("training_architecture_details")
    places = (
        fields.values,
        fields.take("activation_fn_kwargs", dict, {}),
        details if isinstance(details, dict) else {},
    )
    k = next((place["k"] for place in places if place.get("k")), None)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | float)):
        raise fields.refuse("k", k, "a number is")
    return k


def _architecture(fields: Fields) -> str:
    """The architecture's name; before version 6 topk was an activation function."""
    name = fields.take("architecture", str, "standard")
    activation = fields.values.get("activation_fn", fields.values.get("activation_fn_str"))
    if name == "standard" and activation == "topk":
        return "topk"
    if activation not in (None, "relu", "topk"):
        raise fields.refuse("activation_fn", activation, "relu and topk are")
    return name


def _input_scale(fields: Fields, directory: Path) -> float:
    kind = fields.values.get("normalize_activations")
    if kind in (None, False, "none"):
        return 1.0
    if kind not in (True, "expected_average_only_in"):
        raise fields.refuse("normalize_activations", kind, "none and expected_average_only_in are")
    if not (directory / SCALER).is_file():
        raise CheckpointError(
            f"{fields.path}: normalize_activations={kind!r}, but no {SCALER} says by how much: fold it in SAELens first "
            "(fold_activation_norm_scaling_factor)"
        )
    return Fields(directory / SCALER).take("scaling_factor", float)


def _tensors(reader: LatentReader, architecture: str, *, rescale: bool) -> dict[str, torch.Tensor]:
    if "scaling_factor" in reader.names and not torch.all(reader.latents("scaling_factor") == 1):
        raise CheckpointError("SAELens weights hold a scaling_factor other than 1: fold it in SAELens first")
    tensors = {"W_enc": reader.latents("W_enc", 1), "W_dec": reader.latents("W_dec"), "b_dec": reader.whole("b_dec")}
    names = ("b_gate", "r_mag", "b_mag") if architecture == "gated" else ("b_enc",)
    tensors |= {name: reader.latents(name) for name in names}
    if "W_skip" in reader.names:
        tensors["W_skip"] = reader.whole("W_skip").T
    if "topk_threshold" in reader.names:
        tensors["threshold"] = reader.whole("topk_threshold").reshape(1).repeat(reader.stop - reader.start)
    elif "log_threshold" in reader.names:
        tensors["threshold"] = reader.latents("log_threshold").exp()
    elif "threshold" in reader.names:
        tensors["threshold"] = reader.latents("threshold")
    if rescale:
        # Its features are z times decoder norms, selected by that; the decoder then divides by the norms.
        norms = tensors["W_dec"].norm(dim=1).clamp(min=1e-8)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    return tensors


def write(weights: SAEWeights, directory: Path) -> None:
    """Write an SAE; see `Format.write`."""
    config = {
        "architecture": _name(weights),
        "d_in": weights.d_in,
        "d_sae": weights.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": weights.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": weights.metadata.get("reshape_activations", "none"),
        "metadata": _write_metadata(weights),
    }
    if weights.architecture == "topk":
        assert weights.k is not None
        config |= {"k": int(weights.k), "rescale_acts_by_decoder_norm": False}
    if "transcoder" in config["architecture"]:
        config["d_out"] = weights.d_out
    write_json(config, directory / CONFIG)
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold", "b_gate", "r_mag", "b_mag")
    tensors = {name: getattr(weights, name) for name in names}
    write_safetensors({**tensors, "W_skip": None if weights.W_skip is None else weights.W_skip.T}, directory / WEIGHTS)


def _name(weights: SAEWeights) -> str:
    kind = "jumprelu" if weights.threshold is not None else weights.architecture
    if weights.hook_out is None and weights.W_skip is None and weights.d_in == weights.d_out:
        return "standard" if kind == "relu" else kind
    if kind not in ("relu", "jumprelu"):
        raise cannot_hold("saelens", weights, "its transcoders are relu or jumprelu")
    skip = "skip_" if weights.W_skip is not None else ""
    return f"{'jumprelu_' if kind == 'jumprelu' else ''}{skip}transcoder"


def _write_metadata(weights: SAEWeights) -> dict[str, Any]:
    metadata = {key: value for key, value in weights.metadata.items() if key != "reshape_activations"}
    metadata |= {"model_name": weights.model, "hook_name": weights.hook, "sae_lens_version": SCHEMA}
    metadata.setdefault("sae_lens_training_version", None)
    if weights.hook_out is not None:
        metadata["hook_name_out"] = weights.hook_out
    if weights.architecture in _TRAINED_AS:
        details = weights.metadata.get("training_architecture_details")
        metadata["training_architecture"] = _TRAINED_AS[weights.architecture]
        metadata["training_architecture_details"] = {
            **(details if isinstance(details, dict) else {}),
            "k": weights.k,
        }
    return metadata


SAELENS = Format(files=(CONFIG, WEIGHTS), read=read, write=write)
