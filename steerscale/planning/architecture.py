"""A number of parameters -> layers, width and heads that tensor and pipeline ranks can share."""

import math
from collections.abc import Iterator
from dataclasses import replace

from steerscale.config import require, to_mapping
from steerscale.errors import LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout

TOLERANCE = 0.1
"""How far the found model may be from the size asked for, as a share of it."""
ASPECT_WEIGHT = 0.05
"""Weight of a shape's distance from the usual one against its distance from the size, both as logarithms: twice as deep
weighs like 3.5 % too many parameters. Loss depends little on shape (Kaplan et al. 2020, section 3.1)."""
FFN_MULTIPLE = 128
"""The MLP's width is rounded to a multiple, as matrix units and tensor ranks like it."""


def usual_aspect(parameters: float) -> float:
    """d_model / num_layers of GPT-3's sizes (Brown et al. 2020, table 2.1): 64 at 1.25e8, 128 from 6.7e9 on."""
    return min(max(64 * (parameters / 1.25e8) ** (math.log(2) / math.log(6.7e9 / 1.25e8)), 32), 128)


def find_architecture(parameters: float, *, like: ModelConfig, tensor: int = 1, pipeline: int = 1) -> ModelConfig:
    """The shape nearest to `parameters` (all of them, by `ModelConfig.num_parameters`) and to usual proportions.

    Args:
        like: gives everything but depth and widths: positions, norm, activation, sequence, vocabulary (which must be
            known), and the proportions of MLP and key/value groups.
        tensor: divides heads, key/value groups, the MLP's width and the padded vocabulary.
        pipeline: divides the layers.

    Raises LayoutError if no shape within `TOLERANCE` can be split this way.
    """
    for name, degree in (("tp", tensor), ("pp", pipeline)):
        require(degree >= 1, f"--{name} must be at least 1, got {degree}")
    aspect = usual_aspect(parameters)

    def distance(model: ModelConfig) -> float:
        size = abs(math.log(model.num_parameters() / parameters))
        return size + ASPECT_WEIGHT * abs(math.log(model.d_model / model.num_layers / aspect))

    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    candidates = [
        model
        for model in _candidates(like, parameters, tensor=tensor, pipeline=pipeline)
        if abs(model.num_parameters() / parameters - 1) <= TOLERANCE
    ]
    if not candidates:
        raise LayoutError(
            f"no model within {TOLERANCE:.0%} of {parameters:.4g} parameters has layers that --pp {pipeline} and heads that "
            f"--tp {tensor} divide with a vocabulary of {like.tokens:,}: lower the degrees or the vocabulary, or take "
            "another budget"
        )
    best = min(candidates, key=distance)
    layout.check_model(best)
    return best


def _candidates(like: ModelConfig, parameters: float, *, tensor: int, pipeline: int) -> Iterator[ModelConfig]:
    head = 128 if parameters > 1e9 else 64 if parameters > 2e7 else 32
    step = math.lcm(tensor, 4) if parameters > 1e9 else tensor  # what is large now will be split some day
    mlp = like.ffn_width / like.d_model
    share = like.num_heads / like.kv_groups
    padding = math.lcm(like.pad_vocab_to, tensor)
    for heads in range(step, 256 * step + 1, step):
        width = heads * head
        groups = _groups(heads, share, tensor)
        base = replace(
            like,
            num_layers=pipeline,
            d_model=width,
            num_heads=heads,
            num_kv_groups=None if groups == heads else groups,
            d_head=None,
            d_ff=None if mlp == 4 else _ffn(mlp * width, tensor),
            pad_vocab_to=padding,
        )
        # Parameters are a line in the number of layers.
        one = base.num_parameters()
        layer = (replace(base, num_layers=2 * pipeline).num_parameters() - one) / pipeline
        if one > parameters * (1 + TOLERANCE):
            return
        stages = ((parameters - one) / layer + pipeline) / pipeline
        for count in {math.floor(stages), math.ceil(stages)}:
            if count >= 1 and count * pipeline <= 4 * width:
                yield replace(base, num_layers=count * pipeline)


def _groups(heads: int, share: float, tensor: int) -> int:
    """Key/value groups nearest to `heads / share` that divide the heads and that `tensor` divides."""
    possible = [count for count in range(tensor, heads + 1, tensor) if heads % count == 0]
    return min(possible, key=lambda count: abs(math.log(count * share / heads)))


def _ffn(width: float, tensor: int) -> int:
    multiple = math.lcm(FFN_MULTIPLE if width >= 1024 else 32, tensor)
    return max(round(width / multiple), 1) * multiple


def preset_yaml(model: ModelConfig, *, comment: str) -> str:
    """A file for configs/model: the keys of `model` that differ from the defaults, and the shape."""
    import yaml

    plain = to_mapping(model)
    default = to_mapping(ModelConfig(num_layers=1, d_model=1, num_heads=1, seq_len=1))
    always = (
        "num_layers",
        "d_model",
        "num_heads",
        "seq_len",
        "position",
        "norm",
        "activation",
        "bias",
        "tie_embeddings",
    )
    kept = {key: value for key, value in plain.items() if key in always or value != default[key]}
    kept["vocab_size"] = None
    text = yaml.safe_dump(kept, sort_keys=False)
    return f"# {comment}\n{text.replace('vocab_size: null', 'vocab_size: null  # taken from the dataset')}"
