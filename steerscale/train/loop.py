"""The training loop: the only one. It knows a `Task`, not what is trained.

A step: micro-batches -> forward and backward -> one all-reduce of loss, stop flag and sample hash -> AdamW, or a skip if
something is not finite -> metrics, evaluation, checkpoint where they are due. Everything that decides how the run goes on is
in `Progress`, and that is in every checkpoint.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from steerscale.checkpoint.store import CheckpointStore
from steerscale.data.consumed import ConsumedHash
from steerscale.engines.megatron import StepResult
from steerscale.errors import CheckpointError, TrainingError
from steerscale.metrics import Recorder, console_line
from steerscale.optim import learning_rate
from steerscale.parallel.context import ParallelContext
from steerscale.train.config import RunConfig, batch_size_at
from steerscale.train.signals import StopRequest
from steerscale.train.task import Task

logger = logging.getLogger(__name__)

HASH_HALF = 2**30
"""The 61-bit sample hash travels as two doubles, each small enough to be added exactly over 2^22 ranks."""


@dataclass
class Progress:
    """Where a run stands: equal on all ranks."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    applied_steps: int = 0
    """Steps whose update was applied: AdamW's own count."""
    consumed_samples: int = 0
    """Samples consumed, over all replicas."""
    consumed_hash: int = 0
    """Order-independent hash of their identities (`data.consumed`)."""
    skipped_in_row: int = 0
    """Steps skipped since the last one that was applied."""


class Loop:
    """Trains a task from `progress` to the last step, or until a stop is asked for."""

    def __init__(
        self,
        task: Task,
        *,
        config: RunConfig,
        context: ParallelContext,
        store: CheckpointStore,
        recorder: Recorder,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self.task, self.config, self.context = task, config, context
        self.store, self.recorder, self.stop, self.progress = store, recorder, stop, progress
        self._window = Window(skip=config.metrics.warmup_steps)
        self._stopping = False
        self._saved_step = progress.step

    def run(self) -> bool:
        """Train. Returns True at the last step, False if a stop was asked for; either way a checkpoint is on disk.

        Raises TrainingError after too many skipped steps in a row, CheckpointError if the last checkpoint cannot be written.
        """
        config, progress = self.config, self.progress
        while progress.step < config.train.steps and not self._stopping:
            self._step()
            if progress.step % config.metrics.interval == 0 or progress.step == config.train.steps:
                self._report()
            if self._stopping:
                break
            if _due(progress.step, config.train.eval_interval) or progress.step == config.train.steps:
                self._evaluate()
            with self._window.time("checkpoint", excluded=True):
                self.store.poll()
                if _due(progress.step, config.checkpoint.interval) and progress.step < config.train.steps:
                    self._save()
        with self._window.time("checkpoint", excluded=True):
            written = self.store.wait()
            if self._saved_step != progress.step or not written:
                written = self._save() and self.store.wait()
        if not written:
            raise CheckpointError(
                f"the checkpoint of step {progress.step}, the last one, was not written: see the log above"
            )
        return not self._stopping

    def _step(self) -> None:
        config, progress, task = self.config, self.progress, self.task
        size = batch_size_at(config.train.ramp_up, self.context.layout, progress.consumed_samples)
        layout = self.context.layout.with_global_batch(size)
        lr = learning_rate(config.optim, progress.step, config.train.steps)
        self._window.begin(layout)
        with self._window.time("data"):
            micro_batches = task.micro_batches(progress.consumed_samples, layout.gradient_accumulation_steps)
        task.engine.seed_dropout(config.seed + progress.step)
        own_hash = task.consumed()
        extra = (float(bool(self.stop)), float(own_hash % HASH_HALF), float(own_hash // HASH_HALF))
        result = task.engine.train_step(micro_batches, task.forward, lr=lr, extra=extra, timer=self._window.time)
        stop, low, high = result.totals.extra
        self._stopping = stop > 0
        progress.consumed_hash = ConsumedHash.total([int(low), int(high) * HASH_HALF])
        first = progress.consumed_samples
        progress.step += 1
        progress.consumed_samples += size
        if result.applied:
            progress.applied_steps += 1
            progress.skipped_in_row = 0
        else:
            self._skipped(result, first)
        self._window.end(result, lr=lr, size=size)

    def _skipped(self, result: StepResult, first_sample: int) -> None:
        progress = self.progress
        progress.skipped_in_row += 1
        where = f"samples {first_sample} to {progress.consumed_samples - 1}"
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s, %s", progress.step, result.totals.loss, result.grad_norm, where
        )
        values = {
            "loss": result.totals.loss,
            "grad_norm": result.grad_norm,
            "first_sample": first_sample,
            "end_sample": progress.consumed_samples,
        }
        self.recorder.write("skip", progress.step, values)
        limit = self.config.train.max_skipped_in_row
        if progress.skipped_in_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row had a loss or gradient that was not finite, the last on {where}: lower optim.lr, "
                f"or leave the samples out with data.skip=[[{first_sample},{progress.consumed_samples}]]; "
                "the last checkpoint is from before"
            )

    def _report(self) -> None:
        window, progress = self._window, self.progress
        values = window.averages()
        if values is None:
            return
        seconds = values["seconds_per_step"]
        if seconds is not None:
            values.update(self.task.throughput(seconds, window.layout))
            values["eta_seconds"] = seconds * (self.config.train.steps - progress.step)
        values.update(
            bubble_fraction=window.layout.bubble_fraction,
            loss_scale=1.0,
            consumed_samples=progress.consumed_samples,
            consumed_hash=f"{progress.consumed_hash:016x}",
            skipped_total=progress.step - progress.applied_steps,
            **self._memory(),
        )
        self.recorder.write("train", progress.step, values)
        logger.info("%s", console_line({"step": progress.step, **values}, steps=self.config.train.steps))
        window.reset()

    def _evaluate(self) -> None:
        with self._window.time("evaluation", excluded=True):
            values = self.task.evaluate(self._stop_agreed)
        if values:
            self.recorder.write("eval", self.progress.step, values)
            shown = "  ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in values.items())
            logger.info("step %d on held-out text: %s", self.progress.step, shown)

    def _save(self) -> bool:
        self._saved_step = self.progress.step
        model = asdict(self.config.model)
        return self.store.save(
            self.progress.step, self.task.engine.fragments, {"progress": asdict(self.progress), "model": model}
        )

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: an all-reduce of one number, for places outside a step."""
        flag = torch.tensor([float(bool(self.stop))], device=self.context.device)
        dist.all_reduce(flag)
        self._stopping = self._stopping or bool(flag.item())
        return self._stopping

    def _memory(self) -> dict[str, float]:
        """Peak memory over the ranks: one all-reduce of two numbers. On CUDA what torch reserved, else resident memory."""
        peak = _peak_gib(self.context.device)
        both = torch.tensor([peak, -peak], device=self.context.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return {"memory_peak_gib_max": both[0].item(), "memory_peak_gib_min": -both[1].item()}


class Window:
    """Measurements since the last report. Warm-up steps and excluded sections do not count in seconds a step."""

    def __init__(self, *, skip: int) -> None:
        self._skip = skip
        self.layout: Any = None
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._loss_sum, self._tokens, self._grad_norm, self._lr, self._size = 0.0, 0, 0.0, 0.0, 0
        self._steps = self._timed = 0
        self._seconds = 0.0
        self._split: dict[str, float] = defaultdict(float)

    def begin(self, layout: Any) -> None:
        """A step begins, with the batch of `layout`."""
        self.layout, self._started = layout, time.perf_counter()

    def end(self, result: StepResult, *, lr: float, size: int) -> None:
        """The step is done."""
        if self._skip > 0:
            self._skip -= 1
        else:
            self._seconds += time.perf_counter() - self._started
            self._timed += 1
        self._steps += 1
        self._lr, self._size, self._grad_norm = lr, size, result.grad_norm
        if result.applied:
            self._loss_sum, self._tokens = self._loss_sum + result.totals.loss_sum, self._tokens + result.totals.tokens

    @contextmanager
    def time(self, name: str, *, excluded: bool = False) -> Iterator[None]:
        """Attribute the time in this context; `excluded` sections lie outside steps and are reported in total."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if excluded or self._skip == 0:
                self._split[name] += time.perf_counter() - started

    def averages(self) -> dict[str, Any] | None:
        """Means since the last report; None if there was no step."""
        if not self._steps:
            return None
        return {
            "loss": self._loss_sum / self._tokens if self._tokens else float("nan"),
            "grad_norm": self._grad_norm,
            "lr": self._lr,
            "global_batch_size": self._size,
            "seconds_per_step": self._seconds / self._timed if self._timed else None,
            "timed_steps": self._timed,
            "seconds": dict(self._split),
        }


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
