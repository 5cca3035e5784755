"""The training loop: the only one. It knows a `Task`, not what is trained.

A step: micro-batches -> forward and backward -> one all-reduce of loss, stop flag and sample hash -> AdamW, or a skip if
something is not finite -> metrics, evaluation, checkpoint where they are due. Everything that decides how the run goes on is
in `Progress`, and that is in every checkpoint.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist

from steerscale.checkpoint.store import CheckpointStore
from steerscale.data.consumed import ConsumedHash
from steerscale.data.order import Skip
from steerscale.engines.base import StepResult
from steerscale.errors import CheckpointError, TrainingError
from steerscale.metrics import Recorder, console_line, evaluation_lines
from steerscale.optim import learning_rate
from steerscale.parallel.context import ParallelContext
from steerscale.train.config import RunConfig, batch_size_at, total_samples
from steerscale.train.profile import StepProfiler
from steerscale.train.signals import StopRequest
from steerscale.train.task import Task
from steerscale.train.window import Window

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
    skipped_from: int = 0
    """Samples consumed before the first of those."""
    evaluated_step: int = 0
    """Step after which the last evaluation took place; a stop may come before one that is due."""


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
        profiler: StepProfiler | None = None,
        on_report: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_report` is called whenever there is news of the progress: every metrics.interval steps."""
        self.task, self.config, self.context = task, config, context
        self.store, self.recorder, self.stop, self.progress = store, recorder, stop, progress
        self._profiler, self._on_report = profiler, on_report
        self._window = Window(skip=config.metrics.warmup_steps)
        self._stopping = False
        self._tried_step = progress.step

    def run(self) -> bool:
        """Train. Returns True at the last step, False if a stop was asked for; either way a checkpoint is on disk, but for a
        finished run with checkpoint.at_end=false.

        Raises TrainingError after too many skipped steps in a row, CheckpointError if the last checkpoint cannot be written.
        """
        config, progress = self.config, self.progress
        self._evaluate_if_due()  # a stop may have come before it
        if progress.step < config.train.steps and not self._stopping:
            self.task.prepare(self._stop_agreed)
        while progress.step < config.train.steps and not self._stopping:
            self._traced_step()
            if _due(progress.step, config.metrics.interval) or progress.step == config.train.steps or self._stopping:
                self._report()
            self._evaluate_if_due()
            with self._window.time("checkpoint", between_steps=True):
                self.store.poll()
                if self._checkpoint_is_due():
                    self._save()
        self.store.wait()
        wanted = (self._stopping or config.checkpoint.at_end) and self.store.newest_step != progress.step
        if wanted and not (self._save() and self.store.wait()):
            raise CheckpointError(
                f"the checkpoint of step {progress.step}, the last one, was not written: see the log above; older "
                "checkpoints are untouched, make room and start again"
            )
        return not self._stopping

    def _traced_step(self) -> None:
        number, profiler = self.progress.step + 1, self._profiler
        if profiler is None:
            self._step()
            return
        if profiler.is_due(number):
            self._window.skip_step()  # on all ranks: they wait for the one that traces
        with profiler.step(number):
            self._step()

    def _step(self) -> None:
        config, progress, task = self.config, self.progress, self.task
        size = batch_size_at(config.train.ramp_up, self.context.layout, progress.consumed_samples)
        layout = self.context.layout.with_global_batch(size)
        lr = learning_rate(config.optim, progress.step, config.train.steps)
        self._window.begin(layout)
        with self._window.time("data"):
            micro_batches = task.micro_batches(progress.consumed_samples, layout.gradient_accumulation_steps)
        own_hash = task.consumed()
        extra = (float(bool(self.stop)), float(own_hash % HASH_HALF), float(own_hash // HASH_HALF))
        result = task.train_step(micro_batches, step=progress.step, lr=lr, extra=extra, timer=self._window.time)
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

    def _skipped(self, result: StepResult, first: int) -> None:
        """Record a step that was not applied; the one that is too many ends the run."""
        progress, totals = self.progress, result.totals
        if not progress.skipped_in_row:
            progress.skipped_from = first
        progress.skipped_in_row += 1
        begin, end = self._positions(first)
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s, samples %d to %d",
            *(progress.step, totals.loss, result.grad_norm, begin, end - 1),
        )
        values = {"loss": totals.loss, "grad_norm": result.grad_norm, "first_sample": begin, "end_sample": end}
        self.recorder.write("skip", progress.step, values)
        limit = self.config.train.max_skipped_in_row
        if progress.skipped_in_row >= limit:
            self.store.wait()  # what is being written is from before
            begin, end = self._positions(progress.skipped_from)
            skip = [*self._ranges_left_out(), [begin, end]]
            advice = f"lower optim.lr, or leave the samples out with data.skip={str(skip).replace(' ', '')}"
            if self.config.sae is not None:  # samples are vectors, which data.skip does not count
                advice = "lower optim.lr, or see whether the language model's activations are finite"
            raise TrainingError(
                f"{limit} steps in a row had a loss or gradient that was not finite, on samples {begin} to {end - 1}: "
                f"{advice}; the last checkpoint is from before"
            )

    def _positions(self, first: int) -> tuple[int, int]:
        """Positions [begin, end) in the data of what was consumed from `first` on, as data.skip counts them; of vectors their
        own numbers.
        """
        begin, last = Skip(self._ranges_left_out())(np.array([first, self.progress.consumed_samples - 1]))
        return int(begin), int(last) + 1

    def _ranges_left_out(self) -> list[list[int]]:
        config = self.config
        return config.data.skip if config.data is not None and config.sae is None else []

    def _steps_left(self) -> float:
        """Steps to go, in those of the size at hand: while the batch grows, later ones take longer."""
        train, layout = self.config.train, self.config.layout()
        left = total_samples(train.ramp_up, layout, train.steps) - total_samples(
            train.ramp_up, layout, self.progress.step
        )
        return left / self._window.layout.global_batch_size

    def _report(self) -> None:
        window, progress = self._window, self.progress
        values = window.averages()
        if values is None:
            return
        seconds = values["seconds_per_step"]
        if seconds is not None:
            if window.uniform:  # of steps of several sizes the throughput is unknown
                values.update(self.task.throughput(seconds, window.layout))
            values["eta_seconds"] = seconds * self._steps_left()
        values.update(
            bubble_fraction=window.layout.bubble_fraction,
            loss_scale=window.loss_scale,
            consumed_samples=progress.consumed_samples,
            consumed_hash=f"{progress.consumed_hash:016x}",
            skipped_total=progress.step - progress.applied_steps,
            **self._over_ranks(values["seconds"].get("data")),
        )
        self.recorder.write("train", progress.step, values)
        logger.info("%s", console_line({"step": progress.step, **values}, steps=self.config.train.steps))
        window.reset()
        self._on_report()

    def _evaluate_if_due(self) -> None:
        step, train = self.progress.step, self.config.train
        due = step > 0 and (_due(step, train.eval_interval) or step >= train.steps)
        if self._stopping or not due or self.progress.evaluated_step == step:
            return
        with self._window.time("evaluation", between_steps=True):
            values = self.task.evaluate(self._stop_agreed)
        if self._stopping:
            return
        self.progress.evaluated_step = step
        if values:
            self.recorder.write("eval", self.progress.step, values)
            for line in evaluation_lines(values):
                logger.info("step %d on held-out text: %s", self.progress.step, line)

    def _checkpoint_is_due(self) -> bool:
        """Not while steps are being skipped: whoever leaves their samples out begins before the first of them."""
        step, interval = self.progress.step, self.config.checkpoint.interval
        if step == self.config.train.steps or self.progress.skipped_in_row:
            return False
        return step // interval > self._tried_step // interval

    def _save(self) -> bool:
        self._tried_step = self.progress.step
        state = {"progress": asdict(self.progress), **self.task.state()}
        return self.store.save(self.progress.step, self.task.fragments, state)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: an all-reduce of one number, for places outside a step."""
        flag = torch.tensor([float(bool(self.stop))], device=self.context.device)
        dist.all_reduce(flag)
        self._stopping = self._stopping or bool(flag.item())
        return self._stopping

    def _over_ranks(self, data_seconds: float | None) -> dict[str, float | int]:
        """Peak memory over the ranks, and the one that waits longest for its data: an all-gather of two numbers a rank.

        Memory is what torch reserved on CUDA, else resident memory. Waiting for data is the one part of a step in which no
        rank waits for another: where it is long on one of them, that one holds up all.
        """
        own = torch.tensor([_peak_gib(self.context.device), data_seconds or 0.0], device=self.context.device)
        ranks = own.new_empty(dist.get_world_size() * 2)
        dist.all_gather_into_tensor(ranks, own)
        peaks, waits = ranks.view(-1, 2).T.tolist()
        values: dict[str, float | int] = {"memory_peak_gib_max": max(peaks), "memory_peak_gib_min": min(peaks)}
        if data_seconds is not None:
            values.update(data_seconds_max=max(waits), data_slowest_rank=waits.index(max(waits)))
        return values


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
