"""Gemma Scope 2: JumpReLU SAEs and transcoders in params.safetensors (Gemma Scope's tensors, and affine_skip_connection
[d_in, d_out] of transcoders that have one) and config.json. Its crosscoders are not understood.
"""

import re
from pathlib import Path

from steerscale.sae.formats.base import Fields, Format, LatentReader, open_safetensors, write_json, write_safetensors
from steerscale.sae.formats.gemma_scope import jumprelu_tensors, read_jumprelu
from steerscale.sae.weights import SAEWeights

CONFIG, PARAMS, SKIP = "config.json", "params.safetensors", "affine_skip_connection"

_MODULES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Sites in its terms (below model.layers.N) and in ours (below blocks.N)."""
_TAKEN = ("hf_hook_point_in", "hf_hook_point_out", "model_name", "architecture", "affine_connection", "width", "type")


def read(directory: Path, latents: slice | None) -> SAEWeights:
    """Read an SAE; see `Format.read`."""
    fields = Fields(directory / CONFIG)
    architecture = fields.take("architecture", str)
    if architecture != "jump_relu":
        raise fields.refuse("architecture", architecture, "only jump_relu is")
    hook = _ours(fields.take("hf_hook_point_in", str, ""))
    hook_out = _ours(fields.take("hf_hook_point_out", str, ""))
    with open_safetensors(directory / PARAMS) as file:
        reader = LatentReader(file, latents, name="w_enc", axis=1)
        return read_jumprelu(
            reader,
            W_skip=reader.whole(SKIP) if SKIP in reader.names else None,
            hook=hook or None,
            hook_out=hook_out if hook_out not in ("", hook) else None,
            model=fields.take("model_name", str, "") or None,
            metadata={key: value for key, value in fields.values.items() if key not in _TAKEN},
        )


def write(weights: SAEWeights, directory: Path) -> None:
    """Write an SAE; see `Format.write`."""
    tensors = jumprelu_tensors(weights, "gemma_scope_2")
    is_transcoder = weights.hook_out is not None
    config = {
        **weights.metadata,
        "architecture": "jump_relu",
        "type": "transcoder" if is_transcoder else "sae",
        "model_name": weights.model,
        "hf_hook_point_in": _theirs(weights.hook),
        "hf_hook_point_out": _theirs(weights.hook_out if is_transcoder else weights.hook),
        "width": weights.num_latents,
        "affine_connection": weights.W_skip is not None,
    }
    write_json(config, directory / CONFIG)
    write_safetensors({**tensors, SKIP: weights.W_skip}, directory / PARAMS)


def _ours(module: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found is None or found[2] not in _MODULES:
        return module
    return f"blocks.{found[1]}.{_MODULES[found[2]]}"


def _theirs(hook: str | None) -> str | None:
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    modules = {ours: theirs for theirs, ours in _MODULES.items()}
    if found is None or found[2] not in modules:
        return hook
    return f"model.layers.{found[1]}.{modules[found[2]]}"


GEMMA_SCOPE_2 = Format(files=(CONFIG, PARAMS), read=read, write=write)
