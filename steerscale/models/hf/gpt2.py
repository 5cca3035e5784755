"""GPT2LMHeadModel: learned positions, LayerNorm, GELU, biases everywhere, matrices stored as [in, out] (Conv1D)."""

import re
from typing import Any

from steerscale.models.config import ModelConfig
from steerscale.models.hf.fields import ConfigFields
from steerscale.models.hf.recipes import Family, Recipe, fused_qkv, plain, vocabulary

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Name in config.json -> ours; the first of each kind is the one written."""


def _read_config(fields: ConfigFields) -> ModelConfig:
    fields.expect("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.expect(key, False)
    activation = fields.take("activation_function", str, "gelu_new")
    if activation not in _ACTIVATIONS:
        raise fields.unsupported("activation_function", activation, f"these are: {', '.join(_ACTIVATIONS)}")
    dropout, embedding_dropout = fields.take("resid_pdrop", float, 0.1), fields.take("embd_pdrop", float, 0.1)
    if embedding_dropout != dropout:
        raise fields.unsupported("embd_pdrop", embedding_dropout, f"it must equal resid_pdrop={dropout}")
    model = ModelConfig(
        num_layers=fields.take("n_layer", int),
        d_model=fields.take("n_embd", int),
        num_heads=fields.take("n_head", int),
        seq_len=fields.take("n_positions", int, 1024),
        vocab_size=fields.take("vocab_size", int),
        d_ff=fields.take("n_inner", int, None),
        position="learned",
        norm="layernorm",
        norm_eps=fields.take("layer_norm_epsilon", float, 1e-5),
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        bias=True,
        tie_embeddings=fields.take("tie_word_embeddings", bool, True),
        dropout=dropout,
        attention_dropout=fields.take("attn_pdrop", float, 0.1),
        init_std=fields.take("initializer_range", float, 0.02),
    )
    fields.finish()
    return model


def _write_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.tokens,
        "n_positions": model.seq_len,
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_width,
        "activation_function": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == model.activation),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        "model.position=learned": model.position == "learned",
        "model.norm=layernorm": model.norm == "layernorm",
        "model.activation=gelu or gelu_tanh": model.activation in _ACTIVATIONS.values(),
        "model.bias=true": model.bias,
        "model.qkv_bias=true": model.has_qkv_bias,
        "a key/value head for each query head": model.kv_groups == model.num_heads,
        "model.d_head=d_model/num_heads": model.head_width * model.num_heads == model.d_model,
    }


def _recipes(model: ModelConfig) -> dict[str, Recipe]:
    d_model = model.d_model
    positions = plain("transformer.wpe.weight", model.seq_len, d_model)
    recipes = {
        "embedding.word_embeddings.weight": vocabulary("transformer.wte.weight", model),
        "embedding.position_embeddings.weight": Recipe(pieces=positions.pieces, columns=d_model, longer=True),
    }
    for layer in range(model.num_layers):
        recipes |= _layer(model, f"decoder.layers.{layer}", f"transformer.h.{layer}")
    recipes |= _both("decoder.final_layernorm", "transformer.ln_f", d_model)
    if not model.tie_embeddings:
        recipes["output_layer.weight"] = vocabulary("lm_head.weight", model)
    return recipes


def _layer(model: ModelConfig, ours: str, theirs: str) -> dict[str, Recipe]:
    d_model, d_ff = model.d_model, model.ffn_width
    qkv, attention = f"{theirs}.attn.c_attn", f"{ours}.self_attention"

    def starts(kind: str) -> tuple[tuple[str, int], ...]:
        return tuple((f"{qkv}.{kind}", part * d_model) for part in range(3))

    return {
        **_both(f"{ours}.input_layernorm", f"{theirs}.ln_1", d_model),
        f"{attention}.linear_qkv.weight": fused_qkv(model, *starts("weight"), columns=d_model, transposed=True),
        f"{attention}.linear_qkv.bias": fused_qkv(model, *starts("bias")),
        **_both(f"{attention}.linear_proj", f"{theirs}.attn.c_proj", d_model, d_model),
        **_both(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2", d_model),
        **_both(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", d_ff, d_model),
        **_both(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", d_model, d_ff),
    }


def _both(ours: str, theirs: str, rows: int, columns: int | None = None) -> dict[str, Recipe]:
    """Weight and bias of a norm or, with `columns`, of a projection."""
    return {
        f"{ours}.weight": plain(f"{theirs}.weight", rows, columns, transposed=columns is not None),
        f"{ours}.bias": plain(f"{theirs}.bias", rows),
    }


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    ignored=re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    read_config=_read_config,
    write_config=_write_config,
    requirements=_requirements,
    recipes=_recipes,
)
