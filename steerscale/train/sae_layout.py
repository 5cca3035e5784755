"""Whether an SAE run fits its layout, or its two. Torch-free."""

from collections.abc import Mapping
from typing import Any

from steerscale.activations.config import StreamConfig
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.models.hook_points import KINDS, hook_point
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.config import SAEConfig, SAESpec, specs_of


def check_producers(layout: ParallelLayout, model: ModelConfig) -> None:
    """Whether the language model can be cut over producers of its own. Raises LayoutError naming the numbers."""
    try:
        layout.check_model(model)
    except LayoutError as error:
        raise LayoutError(str(error).replace("parallel.", "stream.producers.")) from error


def check_sae_layout(sae: SAEConfig, stream: StreamConfig, model: ModelConfig, layout: ParallelLayout) -> None:
    """Whether SAEs on `stream` can be trained on `layout`. Raises LayoutError or ConfigError naming the numbers."""
    if layout.virtual_pipeline > 1:
        raise LayoutError(
            f"parallel.virtual_pipeline={layout.virtual_pipeline} interleaves a backward pass, and the language model of an "
            "SAE run has none: leave it at 1"
        )
    if stream.lanes % layout.data:
        raise LayoutError(
            f"parallel.data must divide stream.lanes: {layout.data} does not divide {stream.lanes}; each replica streams "
            "whole lanes"
        )
    if layout.global_batch_size % stream.lanes:
        raise LayoutError(
            f"stream.lanes must divide the global batch: {stream.lanes} does not divide {layout.global_batch_size} vectors "
            "(parallel.*_batch_size count activation vectors in an SAE run)"
        )
    if stream.lm_kind == "transformers":
        return  # its hook points are known once it is loaded
    points = {hook: hook_point(hook, model) for hook in sae.all_hooks}
    places = {hook: (point.layer, KINDS.index(point.kind)) for hook, point in points.items()}
    stages = {hook: point.layer * layout.pipeline // model.num_layers for hook, point in points.items()}
    for spec in specs_of(sae, dict.fromkeys(sae.all_hooks, model.d_model)):
        if spec.width % layout.tensor:
            raise LayoutError(
                f"parallel.tensor must divide the latents: {layout.tensor} does not divide the {spec.width} of {spec.name}; "
                "change sae.width or sae.expansion"
            )
        if len({stages[hook] for hook in (*spec.inputs, *spec.outputs)}) > 1:
            raise LayoutError(
                f"the hook points of {spec.name} lie on several of the {layout.pipeline} pipeline stages: take another "
                "parallel.pipeline, or hook points whose layers one stage holds"
            )
        check_transcoder(spec, places)


def check_transcoder(spec: SAESpec, places: Mapping[str, Any]) -> None:
    """Raise ConfigError for a transcoder whose target comes before its input, by the hook points' `places` in the model."""
    if spec.is_transcoder and places[spec.outputs[0]] < places[spec.inputs[0]]:
        raise ConfigError(
            f"sae.targets: {spec.outputs[0]} comes before {spec.inputs[0]} in the model, and a transcoder computes what "
            "comes after; exchange the two"
        )
