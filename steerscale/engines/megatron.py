"""The Megatron-Core engine: micro-batches through the pipeline schedule, gradients over the replicas, one AdamW step.

It knows no model: it is given model chunks and a function that runs a micro-batch through one, so GPTs and SAEs train
through the same lines.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from steerscale.accelerators import adam_class, choose_kernels
from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.engines.base import Forward, StepResult, Timer, Totals, add_up
from steerscale.engines.config import EngineConfig
from steerscale.engines.state import load_fragments, owned_ranges, set_steps, state_fragments
from steerscale.optim import OptimConfig
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    OptimizerConfig,
    TransformerConfig,
    add_in_products,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    forward_backward_no_pipelining,
    gathered_within,
    get_forward_backward_func,
    get_megatron_optimizer,
    optimizers_of,
    tensor_parallel,
)
from steerscale.parallel.shards import Shard

logger = logging.getLogger(__name__)


class MegatronEngine:
    """Forward/backward over micro-batches, gradient reduction, clipping, AdamW, and their state.

    Args:
        chunks: this rank's model chunks (several under interleaving), initialised.
        shards: every parameter of the chunks with its place in the whole model.
        config: Megatron-Core's configuration, shared by the chunks; the engine adds its hooks to it.
        num_reported: numbers that the loss function reports beside the sum of losses and the tokens.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        shards: Sequence[tuple[Shard, torch.nn.Parameter]],
        config: TransformerConfig,
        engine: EngineConfig,
        optim: OptimConfig,
        context: ParallelContext,
        num_reported: int = 0,
    ) -> None:
        self.context, self.config, self.optim = context, config, optim
        self._num_reported = num_reported
        on_cuda = context.device.type == "cuda"
        bf16 = engine.precision == "bf16"
        overlap = engine.overlap and on_cuda
        self.unwrapped = list(chunks)
        self.shards = list(shards)
        # With one replica there is nothing to shard, and gathering it would be a copy of all parameters a step.
        self._distributed = engine.distributed_optimizer and context.layout.data > 1
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self._distributed,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and self._distributed,
        )
        self.chunks = [
            DistributedDataParallel(
                config,
                ddp_config,
                Float16Module(config, chunk) if bf16 else chunk,
                # Only the first chunk's reduction can overlap with a backward that still runs.
                disable_bucketing=index > 0,
                pg_collection=context.groups,
            )
            for index, chunk in enumerate(chunks)
        ]
        add_in_products(self.chunks)
        adam = adam_class(choose_kernels(engine.kernels, on_cuda=on_cuda).adam)
        with gathered_within(context.world), optimizers_of(adam):
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    adam_beta1=optim.beta1,
                    adam_beta2=optim.beta2,
                    adam_eps=optim.eps,
                    clip_grad=optim.clip,
                    bf16=bf16,
                    params_dtype=config.params_dtype,
                    use_distributed_optimizer=self._distributed,
                    overlap_param_gather=overlap and self._distributed,
                ),
                [*self.chunks],
                use_gloo_process_groups=False,
                pg_collection=context.groups,
            )
        _prepare_torch_adam(self.optimizer)
        self._connect(overlap)
        self._schedule: Callable[..., list[torch.Tensor]] = get_forward_backward_func()
        if context.layout.pipeline == 1:
            # Not what Megatron-Core's globals say: a stage of a pipeline may be a world of its own here.
            self._schedule = partial(forward_backward_no_pipelining, pg_collection=context.groups)
        # Sequence parallelism draws from Megatron-Core's generators even where nothing is dropped: they have to exist.
        self.seed_dropout(0)

    def _connect(self, overlap: bool) -> None:
        """Hooks by which Megatron-Core's schedules reach gradient reduction.

        None for loss scaling, which neither fp32 nor bf16 needs; from the configuration to the optimizer it would close a
        circle that the garbage collector cannot see through, and the process groups of every engine would outlive it.
        """
        hooks: Any = self.config  # Megatron-Core's annotations forget that some of these may be lists
        hooks.finalize_model_grads_func = finalize_model_grads
        if overlap:
            # With gradient reduction overlapped, only the last micro-batch of a step may trigger it.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            starts = [chunk.start_grad_sync for chunk in self.chunks]
            hooks.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            hooks.grad_sync_func = starts if len(starts) > 1 else starts[0]

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

        `timer(name)` gives a context in which "forward-backward" and "optimizer" are measured. Collectives beside the
        schedule's: one world all-reduce of 2 + len(extra) doubles (loss, tokens, the caller's numbers), and the gradient
        norm's scalar.
        """
        with timer("forward-backward"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            totals = self._total(self._run(micro_batches, forward, forward_only=False), extra)
        with timer("optimizer"):
            self.optimizer.prepare_grads()
            grad_norm = self.optimizer.get_grad_norm()
            applied = math.isfinite(totals.loss_sum) and math.isfinite(grad_norm)
            if applied:
                self._clip(grad_norm)
                self._set_lr(lr)
                self.optimizer.step_with_ready_grads()
        return StepResult(totals=totals, grad_norm=grad_norm, applied=applied)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> Totals:
        """Losses over this replica's `micro_batches`, summed over all replicas; nothing is changed."""
        for chunk in self.chunks:
            chunk.eval()
        return self._total(self._run(micro_batches, forward, forward_only=True), ())

    @torch.no_grad()
    def infer(self, micro_batch: Any, forward: Callable[[Any, torch.nn.Module], torch.Tensor]) -> torch.Tensor | None:
        """Run one micro-batch through the pipeline; the last stage's output there, None on other stages."""
        for chunk in self.chunks:
            chunk.eval()
        # The interleaved schedule takes micro-batches by the number of stages only: it gets copies.
        copies = [micro_batch] * (self.context.layout.pipeline if len(self.chunks) > 1 else 1)
        # Without a loss function the schedule hands back the last stage's output as it is.
        outputs = self._run(copies, lambda batch, chunk: (forward(batch, chunk), None), forward_only=True)  # type: ignore[arg-type,return-value]
        return outputs[0] if outputs else None

    def _run(self, micro_batches: Sequence[Any], forward: Forward, *, forward_only: bool) -> list[torch.Tensor]:
        def step(batches: Iterator[Any], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            return forward(next(batches), chunk)

        iterators = [iter(micro_batches) for _ in self.chunks]
        size, length = micro_batches[0].shape
        return self._schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=forward_only,
        )

    def _total(self, reports: list[torch.Tensor], extra: tuple[float, ...]) -> Totals:
        return add_up(reports, extra, context=self.context, num_reported=self._num_reported)

    def _clip(self, grad_norm: float) -> None:
        if self.optim.clip > 0:
            parameters: list[torch.Tensor] = [*self.optimizer.get_parameters()]
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.optim.clip, total_norm=grad_norm)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.optim.weight_decay * group["wd_mult"]

    def seed_dropout(self, seed: int) -> None:
        """Seed this step's dropout. Seeding every step from the global step keeps generators out of checkpoints."""
        at = self.context.at
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 7919 * at.data + 104729 * at.pipeline)

    def close(self) -> None:
        """Let go of the model: Megatron-Core's gradient hooks form a cycle through C++ that Python cannot collect.

        Without this every engine of a process would keep its parameters, and its process groups their threads.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()

    def state(self) -> dict[str, Any]:
        """Nothing beside the fragments."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing beside the fragments."""

    def adopt_weights(self) -> None:
        """In fp32 the optimizer's weights are views of the parameters."""

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which every parameter of this rank is there: they always are."""
        return nullcontext()

    def fragments(self) -> list[Fragment]:
        """This rank's part of the state, for a checkpoint."""
        owned = owned_ranges(self.optimizer)
        return state_fragments(self.shards, owned, self.context, distributed=self._distributed)

    def load(self, reader: FragmentReader, *, optimizer_steps: int) -> None:
        """Take over the state of a checkpoint, whatever layout or engine wrote it."""
        load_fragments(self.shards, owned_ranges(self.optimizer), self.context, reader)
        set_steps(self.optimizer, optimizer_steps)


def _prepare_torch_adam(optimizer: Any) -> None:
    """Where Megatron-Core fell back to torch's AdamW: use its fused kernel, and create its state now.

    With the whole state there from the start, checkpoints have one form from step 0 and memory is known before step 1.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
