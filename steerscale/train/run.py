"""What one rank does: join the groups, build the task, resume, train, leave word.

The worker's entry point imports this late, since torch and Megatron-Core come with it.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from steerscale.activations.source import ActivationSource
from steerscale.checkpoint.store import CheckpointStore, load_state
from steerscale.config import dump_yaml, from_mapping
from steerscale.errors import CheckpointError
from steerscale.metrics import Recorder
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.planning.hardware import peak_tflops
from steerscale.rundir import KERNELS, State, Status, read_config, write_error, write_status, write_text
from steerscale.train.apart import run_apart
from steerscale.train.config import RunConfig
from steerscale.train.gpt import build_gpt_task
from steerscale.train.host_memory import keep_freed_memory
from steerscale.train.kernels import kernel_report
from steerscale.train.loop import Loop, Progress
from steerscale.train.preflight import is_due, run_preflight
from steerscale.train.profile import StepProfiler
from steerscale.train.sae import build_sae_task
from steerscale.train.signals import StopRequest
from steerscale.train.task import Task

logger = logging.getLogger(__name__)


def run(run_dir: Path, *, rank: int, stop: StopRequest, threads: int) -> None:
    """Train what the run directory describes, from its newest checkpoint if it has one."""
    config = from_mapping(RunConfig, read_config(run_dir))
    torch.set_num_threads(threads)
    minutes = config.launcher.timeout_minutes
    if config.placement() is not None:
        run_apart(
            config, stop, train=partial(_train, config, run_dir, rank, stop), leaving_word=_leaving_word(run_dir, rank)
        )
        return
    with initialize(config.layout(), timeout_minutes=minutes) as context, _leaving_word(run_dir, rank):
        _train(config, run_dir, rank, stop, context)


def _train(
    config: RunConfig,
    run_dir: Path,
    rank: int,
    stop: StopRequest,
    context: ParallelContext,
    source: ActivationSource | None = None,
) -> None:
    if context.device.type == "cpu":
        keep_freed_memory()
    with closing(_build_task(config, context, run_dir, source)) as task:
        store = CheckpointStore(run_dir / "checkpoints", config.checkpoint)
        progress = _resume(config, store, task)

        def report(state: State, reason: str = "") -> None:
            if rank == 0:
                status = Status(state=state, step=progress.step, steps=config.train.steps, reason=reason)
                write_status(run_dir, status)

        with closing(_recorder(config, progress, run_dir, writes=rank == 0)) as recorder:
            report("running")
            _announce(config, context, task, progress, recorder)
            loop = Loop(
                task,
                config=config,
                context=context,
                store=store,
                recorder=recorder,
                stop=stop,
                progress=progress,
                profiler=StepProfiler(config.profile, run_dir=run_dir, rank=rank, device=context.device),
                on_report=lambda: report("running"),
            )
            finished = loop.run()
        if finished:
            report("finished")
        else:
            report("stopped", f"stopped by {stop.name or 'a signal to another rank'}; start again to go on")
        logger.info("%s at step %d of %d", "finished" if finished else "stopped", progress.step, config.train.steps)


def _build_task(config: RunConfig, context: ParallelContext, run_dir: Path, source: ActivationSource | None) -> Task:
    if is_due(config, context):
        run_preflight(config, context, run_dir)  # while the device is still empty
    peak = _peak_tflops(config, context.device)
    if config.sae is not None:
        return build_sae_task(config, context, peak_tflops=peak, source=source)
    return build_gpt_task(config, context, peak_tflops=peak)


@contextmanager
def _leaving_word(run_dir: Path, rank: int) -> Iterator[None]:
    """Write down an error before the process group is left: what fails first must be first in time.

    Leaving breaks the other ranks' connections, and they fail of that within a millisecond.
    """
    try:
        yield
    except Exception as error:
        write_error(run_dir, rank, error)
        raise


def _recorder(config: RunConfig, progress: Progress, run_dir: Path, *, writes: bool) -> Recorder:
    return Recorder(
        run_dir,
        writes=writes,
        tensorboard=config.metrics.tensorboard,
        wandb_project=config.metrics.wandb_project,
        config_text=dump_yaml(config),
        step=progress.step,
        evaluated=progress.evaluated_step == progress.step,
        name=config.name,
    )


def _resume(config: RunConfig, store: CheckpointStore, task: Task) -> Progress:
    """Progress of the newest checkpoint, its state loaded; or a fresh start."""
    checkpoint = store.latest()
    if checkpoint is None:
        return Progress()
    state, reader = load_state(checkpoint)
    progress = Progress(**state["progress"])
    try:
        task.resume(state, reader, applied_steps=progress.applied_steps, consumed_hash=progress.consumed_hash)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    logger.info("resumed from %s", checkpoint)
    return progress


def _announce(config: RunConfig, context: ParallelContext, task: Task, progress: Progress, recorder: Recorder) -> None:
    if context.rank != 0:
        return
    device, ranks, placement = _device_name(context.device), context.layout.world_size, config.placement()
    producers = {} if placement is None else {"producers": str(placement.producers)}
    values = {"layout": str(context.layout), "device": device, "ranks": config.num_ranks(), **producers}
    recorder.write("start", progress.step, values)
    how = f"{config.engine.precision}, {config.engine.title}"
    logger.info("%s on %d x %s, %s", context.layout, ranks, device, how)
    if placement is not None:
        logger.info(
            "the language model on %d ranks of its own: %s", placement.producers.world_size, placement.producers
        )
    logger.info("%s", task.describe())
    table = kernel_report(config, on_cuda=context.device.type == "cuda")
    logger.info("kernels\n%s", table)
    write_text(Path(config.run_dir) / KERNELS, f"{table}\n")


def _peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    if device.type != "cuda" or config.engine.fp8 != "none":
        return config.metrics.peak_tflops  # no peak is known for steps that are partly in 8 bits
    return peak_tflops(_device_name(device), precision=config.engine.precision, override=config.metrics.peak_tflops)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
