"""Names of the places where activations can be read and replaced. Torch-free: plans and dry runs check them too.

The names and their meaning are TransformerLens's, so that public SAEs find their layer: `blocks.{i}.hook_resid_pre`,
`.hook_attn_out`, `.hook_mlp_out`, `.hook_resid_post`, with i counted over the whole model.
"""

import difflib
from typing import NamedTuple

from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig

KINDS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
"""In the order of the forward pass: block input; attention and MLP output, biases included, before dropout and the
residual add; block output. `blocks.0.hook_resid_pre` is the embedding, `hook_resid_post` comes before any final norm."""


class HookPoint(NamedTuple):
    """One place in the model."""

    layer: int
    """Block, counted from 0 over the whole model."""
    kind: str
    """One of KINDS."""

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{self.kind}"


def hook_points(model: ModelConfig) -> list[str]:
    """Every hook point's name, in the order of the forward pass."""
    return [str(HookPoint(layer, kind)) for layer in range(model.num_layers) for kind in KINDS]


def hook_point(name: str, model: ModelConfig) -> HookPoint:
    """The hook point called `name`. Raises ConfigError with the nearest name if `model` has none called so."""
    block, _, kind = name.rpartition(".")
    layer = block.removeprefix("blocks.")
    known = hook_points(model)
    if name in known:
        return HookPoint(int(layer), kind)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"there is no hook point {name!r}: blocks.0 to blocks.{model.num_layers - 1} have {', '.join(KINDS)} each{hint}"
    )
