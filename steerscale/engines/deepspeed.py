"""The DeepSpeed engine: the same micro-batches, losses and figures as the Megatron engine, by DeepSpeed's machinery.

Without a pipeline the model is a `DeepSpeedEngine`'s, with ZeRO-0 to 3; with one, it is a `PipelineModule` of layers (ZeRO-0
and 1, plain 1F1B). Tensor parallelism is Megatron-Core's either way: DeepSpeed is told the groups.

Losses are divided by the number of tokens of the whole global batch before the backward pass, where Megatron-Core divides
gradients after it; DeepSpeed's own divisions, by GAS and by the replicas, are multiplied out beforehand.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.engines.base import Forward, StepResult, Timer, Totals, add_up
from steerscale.engines.config import EngineConfig
from steerscale.engines.deepspeed_adam import ClippedAdamW, adamw_settings, parameter_groups
from steerscale.engines.deepspeed_config import ds_config
from steerscale.engines.deepspeed_library import deepspeed_library, quiet
from steerscale.engines.deepspeed_state import basic_adam, owned_ranges, prepare_state, set_steps
from steerscale.engines.state import load_fragments, state_fragments
from steerscale.optim import OptimConfig
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import tensor_parallel
from steerscale.parallel.shards import Shard

logger = logging.getLogger(__name__)

Tokens = Callable[[Any], torch.Tensor]
"""How many losses of a micro-batch count: a tensor of one number, on the host."""


SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What of DeepSpeed's dynamic loss scaler changes."""


class Groups:
    """Our process groups by the names that DeepSpeed asks an `mpu` for."""

    def __init__(self, context: ParallelContext) -> None:
        groups, layout, at = context.groups, context.layout, context.at
        for names, group, rank, size in (
            (("data_parallel",), groups.dp, at.data, layout.data),
            (("model_parallel", "tensor_model_parallel", "slice_parallel"), groups.tp, at.tensor, layout.tensor),
        ):
            for name in names:
                setattr(self, f"get_{name}_group", lambda group=group: group)
                setattr(self, f"get_{name}_rank", lambda rank=rank: rank)
                setattr(self, f"get_{name}_world_size", lambda size=size: size)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the replicas."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())  # type: ignore[attr-defined]


class DeepSpeedEngine:
    """Trains one module on this rank without a pipeline; `deepspeed_pipeline` adds what a pipeline needs.

    Args:
        module: the model, initialised.
        shards: every parameter of it with its place in the whole model.
        tokens: how many losses of a micro-batch count.
        num_reported: numbers that the loss function reports beside the sum of losses and the tokens.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        shards: Sequence[tuple[Shard, torch.nn.Parameter]],
        engine: EngineConfig,
        optim: OptimConfig,
        context: ParallelContext,
        tokens: Tokens,
        num_reported: int = 0,
    ) -> None:
        self.context, self.optim, self.shards = context, optim, list(shards)
        self.unwrapped: Sequence[torch.nn.Module] = [module]
        self.ds_config = ds_config(
            engine,
            optim,
            context.layout,
            parameters=sum(parameter.numel() for _, parameter in self.shards),
            on_cuda=context.device.type == "cuda",
        )
        self._zero, self._tokens, self._num_reported = engine.zero, tokens, num_reported
        with ExitStack() as undo:
            self._library = undo.enter_context(deepspeed_library(context))
            with quiet():
                self.engine = self._build(module)
                prepare_state(self.engine.optimizer)
            self._undo = undo.pop_all()
        # What is owned is fixed from here on, and ZeRO-3 finds it only while nothing is gathered.
        self._owned = owned_ranges(self.engine.optimizer, (parameter for _, parameter in self.shards))
        self.seed_dropout(0)

    def _build(self, module: torch.nn.Module) -> Any:
        # With ZeRO-3 DeepSpeed cuts the parameters here: each rank holds its shard whole until then.
        return self._initialize(module, mpu=Groups(self.context))

    def _initialize(self, module: torch.nn.Module, *, mpu: Any) -> Any:
        groups = parameter_groups((p for _, p in self.shards), weight_decay=self.optim.weight_decay)
        settings = adamw_settings(self.optim)
        if self._zero:
            adam: torch.optim.Optimizer = torch.optim.AdamW(groups, **settings)
        else:
            at, group = self.context.at, self.context.groups.mp
            adam = ClippedAdamW(groups, clip=self.optim.clip, tensor_rank=at.tensor, group=group, **settings)
        engine, *_ = self._library.initialize(
            model=module, optimizer=adam, config=self.ds_config, mpu=mpu, dist_init_required=False
        )
        return engine

    def train_step(
        self,
        micro_batches: Sequence[Any],
        forward: Forward,
        *,
        lr: float,
        extra: tuple[float, ...] = (),
        timer: Timer = nullcontext,
    ) -> StepResult:
        """One optimizer step over this replica's `micro_batches`.

        Collectives beside DeepSpeed's: an all-reduce of the number of tokens over the replicas, one of 2 + len(extra)
        doubles over the world.
        """
        with timer("forward-backward"):
            self._set_accumulation(len(micro_batches))
            scale = self._loss_scale(micro_batches)
            totals = self._total(self._forward_backward(micro_batches, forward, scale), extra)
        with timer("optimizer"):
            for group in basic_adam(self.engine.optimizer).param_groups:
                group["lr"] = lr
            used_scale = float(getattr(self.engine.optimizer, "loss_scale", 1.0))
            self._step()
        applied = not self.engine.optimizer.overflow
        grad_norm = float(self.engine.get_global_grad_norm()) if applied else math.inf
        return StepResult(totals=totals, grad_norm=grad_norm, applied=applied, loss_scale=used_scale)

    def _forward_backward(
        self, micro_batches: Sequence[Any], forward: Forward, scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of all micro-batches, reduced; the reports."""
        self.engine.train()
        reports = []
        for number, batch in enumerate(micro_batches):
            output, reduce = forward(batch, self.engine)
            loss_sum, _, report = reduce(output)
            reports.append(report)
            self.engine.backward(scaled(loss_sum, scale))
            if number + 1 < len(micro_batches):
                self.engine.step()  # counts micro-batches, nothing else
        return reports

    def _step(self) -> None:
        self.engine.step()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> Totals:
        """Losses over this replica's `micro_batches`, summed over all replicas; nothing is changed."""
        self.engine.eval()
        reports = []
        for batch in micro_batches:
            output, reduce = forward(batch, self.engine)
            reports.append(reduce(output)[2])
        return self._total(reports, ())

    def _set_accumulation(self, num_micro_batches: int) -> None:
        if num_micro_batches != self.engine.gradient_accumulation_steps():
            layout = self.context.layout
            self.engine.set_train_batch_size(layout.micro_batch_size * layout.data * num_micro_batches)
            # It updates after each micro-batch whose number is a multiple of GAS: with another GAS it has to count anew.
            self.engine.micro_steps = 0

    def _loss_scale(self, micro_batches: Sequence[Any]) -> torch.Tensor:
        """GAS x DP / tokens of the global batch: what makes DeepSpeed's means over GAS and DP a mean over tokens.

        All-reduces one number over the replicas.
        """
        tokens = torch.stack([self._tokens(batch) for batch in micro_batches]).double().sum().to(self.context.device)
        dist.all_reduce(tokens, group=self.context.groups.dp)
        return len(micro_batches) * self.context.layout.data / tokens

    def _total(self, reports: Sequence[torch.Tensor], extra: tuple[float, ...]) -> Totals:
        return add_up(reports, extra, context=self.context, num_reported=self._num_reported)

    def seed_dropout(self, seed: int) -> None:
        """Seed this step's dropout. Seeding every step from the global step keeps generators out of checkpoints."""
        at = self.context.at
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 7919 * at.data + 104729 * at.pipeline)

    def fragments(self) -> list[Fragment]:
        """This rank's part of the state, for a checkpoint."""
        return state_fragments(self.shards, self._owned, self.context, distributed=self._zero > 0)

    def load(self, reader: FragmentReader, *, optimizer_steps: int) -> None:
        """Take over the state of a checkpoint, whatever layout or engine wrote it."""
        load_fragments(self.shards, self._owned, self.context, reader, whole=self._writable)
        set_steps(self.engine.optimizer, optimizer_steps)

    def state(self) -> dict[str, Any]:
        """The dynamic loss scale of fp16."""
        scaler = self._scaler()
        return {} if scaler is None else {"loss_scaler": {name: getattr(scaler, name) for name in SCALER}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the loss scale of a checkpoint; one of another precision has none, and it is found anew."""
        scaler = self._scaler()
        for name, value in state.get("loss_scaler", {}).items() if scaler is not None else ():
            setattr(scaler, name, value)

    def _scaler(self) -> Any:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Copy this rank's range of each parameter into the optimizer's weights: ZeRO keeps its own, in fp32 too."""
        for parameter, owned in self._owned.items() if 0 < self._zero < 3 else ():
            owned.tensors["weight"].copy_(parameter.reshape(-1)[owned.start : owned.stop])

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which every parameter of this rank is there in its local shape."""
        if self._zero < 3:
            return nullcontext()
        return self._library.zero.GatheredParameters([parameter for _, parameter in self.shards])

    def _writable(self, parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
        """ZeRO-3: gathered, and cut anew from what the first replica made of it."""
        if self._zero < 3:
            return nullcontext()
        return self._library.zero.GatheredParameters([parameter], modifier_rank=0)

    def close(self) -> None:
        """Let go of the model and of DeepSpeed's process groups."""
        with quiet():
            self.engine.destroy()
        self._owned.clear()
        self._undo.close()


def scaled(loss_sum: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The loss to differentiate; nan for one that is not finite, so that no gradient of it passes for one that is.

    (An infinite loss can have finite gradients: a target of probability 0 has.)
    """
    return loss_sum.float() * torch.where(torch.isfinite(loss_sum.detach()), scale.float(), math.nan)
