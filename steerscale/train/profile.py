"""Traces of chosen steps: torch's profiler around one optimizer step, a file a step and rank in `run_dir/profile`.

rank0.12.pt.trace.json.gz   step 12 of rank 0, for TensorBoard's profiler plugin, Perfetto and `steerscale profile`
rank0.12.memory.html        profile.memory on CUDA: what was allocated when, a page for a browser
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from steerscale.train.profile_config import ProfileConfig
from steerscale.train.profile_trace import DIRECTORY, SUFFIX, step_name

logger = logging.getLogger(__name__)

HISTORY = 1_000_000
"""Allocations that a page of memory can hold."""


class StepProfiler:
    """Traces the steps it was told to, on the ranks it was told to; elsewhere it does nothing."""

    def __init__(self, config: ProfileConfig, *, run_dir: Path, rank: int, device: torch.device) -> None:
        self._config, self._rank, self._device = config, rank, device
        self._directory = run_dir / DIRECTORY

    def is_due(self, step: int) -> bool:
        """Whether any rank traces this step: then all of them wait for it, and its time means little."""
        return step in self._config.steps

    def step(self, step: int) -> AbstractContextManager[None]:
        """The context in which optimizer step `step`, counted from 1, takes place."""
        traced = self.is_due(step) and self._rank in self._config.ranks
        return self._traced(step) if traced else nullcontext()

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        on_cuda = self._device.type == "cuda"
        snapshot = self._config.memory and on_cuda
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        try:
            with profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
                record_shapes=self._config.shapes,
                profile_memory=self._config.memory,
                with_stack=self._config.stacks,
            ) as trace:
                with record_function(step_name(step)):
                    yield
                if on_cuda:
                    torch.cuda.synchronize()  # kernels still running belong to the step as well
            self._write(trace, step, snapshot=snapshot)
        finally:
            if snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, trace: profile, step: int, *, snapshot: bool) -> None:
        """Whole files or none: a full disk costs a trace, not the run."""
        name = f"rank{self._rank}.{step}"
        try:
            self._directory.mkdir(exist_ok=True)
            path, part = self._directory / f"{name}{SUFFIX}", self._directory / f".{name}{SUFFIX}"
            trace.export_chrome_trace(str(part))
            part.replace(path)
            if snapshot:
                from torch.cuda._memory_viz import trace_plot

                page = trace_plot(torch.cuda.memory._snapshot())
                (self._directory / f"{name}.memory.html").write_text(page, encoding="utf-8")
        except (OSError, RuntimeError) as error:
            logger.warning("the trace of step %d could not be written: %s", step, error)
            return
        logger.info("trace of step %d: %s", step, path)
