"""DeepSpeed's pipeline: layers handed over as specifications, built by the stage they fall to, run in plain 1F1B."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from steerscale.engines.base import Forward, Totals
from steerscale.engines.config import EngineConfig
from steerscale.engines.deepspeed import DeepSpeedEngine, Tokens, scaled
from steerscale.engines.deepspeed_library import deepspeed_library, quiet
from steerscale.optim import OptimConfig
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Shard


class Plan(Protocol):
    """A layer that is still to be built."""

    @property
    def kind(self) -> type[torch.nn.Module]:
        """Its class."""
        ...

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the class is called with."""
        ...

    @property
    def tied(self) -> bool:
        """Whether its attribute `tied_weight` is one parameter with that of the other layers of which this is said."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """A model as DeepSpeed's pipeline wants it: a list of layers, and what goes in and comes out."""

    plans: Sequence[Plan]
    spread: type[torch.nn.Module]
    """The kind of layer of which every stage gets as many."""
    inputs: Callable[[Any], Sequence[torch.Tensor]]
    """What the first layer reads of a micro-batch."""
    outputs: Callable[..., torch.Tensor]
    """(the last layer's output, *what the forward function calls a chunk with) -> what a chunk returns: losses."""
    prepare: Callable[[Sequence[torch.nn.Module]], list[tuple[Shard, torch.nn.Parameter]]]
    """Fills the layers of this stage with their initial weights; returns their shards."""


class DeepSpeedPipelineEngine(DeepSpeedEngine):
    """The DeepSpeed engine with pipeline stages: ZeRO-0 and 1."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        engine: EngineConfig,
        optim: OptimConfig,
        context: ParallelContext,
        tokens: Tokens,
        num_reported: int = 0,
    ) -> None:
        self._pipeline, self._batches, self._reports = pipeline, iter(()), []
        self._forward: Forward
        self._scale: torch.Tensor | None = None
        with ExitStack() as undo:
            # Process groups of the pipeline are made with the module: the library has to be there before the engine is.
            library = undo.enter_context(deepspeed_library(context))
            with quiet(), torch.no_grad():  # it broadcasts tied weights, which is nothing to differentiate
                module = _build_module(library, pipeline, context, self._loss)
            layers = _unique(module.forward_funcs)
            super().__init__(
                module,
                shards=pipeline.prepare(layers),
                engine=engine,
                optim=optim,
                context=context,
                tokens=tokens,
                num_reported=num_reported,
            )
            self.unwrapped = layers
            self._outer = undo.pop_all()

    def _build(self, module: Any) -> Any:
        engine = self._initialize(module, mpu=None)  # the module brings its own
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        # The update is ours to call: it is timed on its own, and gets this step's learning rate.
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, OptimizerStep: lambda engine: None}
        return engine

    def _forward_backward(
        self, micro_batches: Sequence[Any], forward: Forward, scale: torch.Tensor
    ) -> list[torch.Tensor]:
        self._begin(micro_batches, forward, scale)
        self.engine.train_batch(self._feed(micro_batches))
        return self._reports

    def _step(self) -> None:
        self.engine._exec_optimizer_step()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> Totals:
        """Losses over this replica's `micro_batches`, summed over all replicas; nothing is changed."""
        self._begin(micro_batches, forward, None)
        self.engine.eval_batch(
            self._feed(micro_batches),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(micro_batches),
        )
        return self._total(self._reports, ())

    def _begin(self, micro_batches: Sequence[Any], forward: Forward, scale: torch.Tensor | None) -> None:
        self._batches, self._reports = iter(micro_batches), []
        self._forward, self._scale = forward, scale

    def _feed(self, micro_batches: Sequence[Any]) -> Iterator[tuple[Any, tuple[()]]]:
        """What DeepSpeed reads: inputs, and no labels, since the loss takes the micro-batch itself."""
        for batch in micro_batches:
            first, *rest = self._pipeline.inputs(batch)
            yield ((first, *rest) if rest else first), ()

    def _loss(self, output: torch.Tensor, labels: tuple[()]) -> torch.Tensor:
        """Called on the last stage once for each micro-batch, in order."""

        def chunk(*arguments: Any) -> torch.Tensor:
            return self._pipeline.outputs(output, *arguments)

        losses, reduce = self._forward(next(self._batches), chunk)  # type: ignore[arg-type]
        loss_sum, _, report = reduce(losses)
        self._reports.append(report)
        return loss_sum if self._scale is None else scaled(loss_sum, self._scale)

    def close(self) -> None:
        """Let go of the model and of DeepSpeed's process groups."""
        super().close()
        self._outer.close()


def _build_module(library: Any, pipeline: Pipeline, context: ParallelContext, loss: Callable) -> Any:
    from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    layout = context.layout
    specs = [
        TiedLayerSpec("tied", plan.kind, *plan.arguments, tied_weight_attr="tied_weight")
        if plan.tied
        else LayerSpec(plan.kind, *plan.arguments)
        for plan in pipeline.plans
    ]
    module = PipelineModule(
        specs,
        # Its axes pipe, data, model number the ranks as ours do.
        topology=PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data),
        loss_fn=loss,
        partition_method=f"type:{pipeline.spread.__name__}",
    )
    # A replica's stages must be those of our own groups, or data and losses would go astray.
    assert module.stage_id == context.at.pipeline
    assert module.mpu().get_data_parallel_rank() == context.at.data
    own = sum(isinstance(layer, pipeline.spread) for layer in module.forward_funcs)
    assert own * layout.pipeline == sum(plan.kind is pipeline.spread for plan in pipeline.plans)
    return module


def _unique(layers: Sequence[Any]) -> list[torch.nn.Module]:
    return list(dict.fromkeys(layers))
