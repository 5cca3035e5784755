"""LlamaForCausalLM: rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases; embeddings tied or not.

Llama's rotary embedding turns halves of a head against each other, as ours does, so weights need no permutation.
"""

import re
from typing import Any

from steerscale.models.config import ModelConfig
from steerscale.models.hf.fields import ConfigFields
from steerscale.models.hf.recipes import Family, Piece, Recipe, fused_qkv, plain, vocabulary


def _read_config(fields: ConfigFields) -> ModelConfig:
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    model = ModelConfig(
        num_layers=fields.take("num_hidden_layers", int),
        d_model=fields.take("hidden_size", int),
        num_heads=fields.take("num_attention_heads", int),
        seq_len=fields.take("max_position_embeddings", int, 2048),
        vocab_size=fields.take("vocab_size", int),
        num_kv_groups=fields.take("num_key_value_heads", int, None),
        d_head=fields.take("head_dim", int, None),
        d_ff=fields.take("intermediate_size", int),
        position="rotary",
        rope_theta=_rope_theta(fields),
        norm="rmsnorm",
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        activation="swiglu",
        bias=False,
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        attention_dropout=fields.take("attention_dropout", float, 0.0),
        init_std=fields.take("initializer_range", float, 0.02),
    )
    fields.finish()
    return model


def _rope_theta(fields: ConfigFields) -> float:
    """The base of plain rotary embeddings: `rope_theta` beside `rope_scaling` (transformers 4) or in `rope_parameters` (5)."""
    theta = fields.take("rope_theta", float, 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        parameters = fields.raw(key) or {}
        if not isinstance(parameters, dict):
            raise fields.unsupported(key, parameters, "it must be a mapping or null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise fields.unsupported(f"{key}.rope_type", kind, "only 'default' is")
        for name, value in parameters.items():
            if name not in ("rope_type", "type", "rope_theta") and not (name == "partial_rotary_factor" and value == 1):
                raise fields.unsupported(f"{key}.{name}", value, "only rope_theta is")
        theta = parameters.get("rope_theta", theta)
        if not isinstance(theta, (int, float)) or isinstance(theta, bool):
            raise fields.unsupported(f"{key}.rope_theta", theta, "it must be a number")
    return float(theta)


def _write_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.tokens,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        # transformers 4 reads the first, 5 the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        "model.position=rotary": model.position == "rotary",
        "model.norm=rmsnorm": model.norm == "rmsnorm",
        "model.activation=swiglu": model.activation == "swiglu",
        "model.bias=false": not model.bias,
        "model.qkv_bias=false": not model.has_qkv_bias,
        "a model.d_model that model.num_heads divides": model.d_model % model.num_heads == 0,
    }


def _recipes(model: ModelConfig) -> dict[str, Recipe]:
    recipes = {"embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight", model)}
    for layer in range(model.num_layers):
        recipes |= _layer(model, f"decoder.layers.{layer}", f"model.layers.{layer}")
    recipes["decoder.final_layernorm.weight"] = plain("model.norm.weight", model.d_model)
    if not model.tie_embeddings:
        recipes["output_layer.weight"] = vocabulary("lm_head.weight", model)
    return recipes


def _layer(model: ModelConfig, ours: str, theirs: str) -> dict[str, Recipe]:
    d_model, d_ff = model.d_model, model.ffn_width
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    gate_up = (Piece(f"{mlp}.gate_proj.weight", 0, d_ff), Piece(f"{mlp}.up_proj.weight", 0, d_ff))
    query, key, value = ((f"{attention}.{name}_proj.weight", 0) for name in "qkv")
    return {
        f"{ours}.input_layernorm.weight": plain(f"{theirs}.input_layernorm.weight", d_model),
        f"{ours}.self_attention.linear_qkv.weight": fused_qkv(model, query, key, value, columns=d_model),
        f"{ours}.self_attention.linear_proj.weight": plain(
            f"{attention}.o_proj.weight", d_model, model.num_heads * model.head_width
        ),
        f"{ours}.pre_mlp_layernorm.weight": plain(f"{theirs}.post_attention_layernorm.weight", d_model),
        f"{ours}.mlp.linear_fc1.weight": Recipe(pieces=gate_up, columns=d_model),
        f"{ours}.mlp.linear_fc2.weight": plain(f"{mlp}.down_proj.weight", d_model, d_ff),
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
    read_config=_read_config,
    write_config=_write_config,
    requirements=_requirements,
    recipes=_recipes,
)
