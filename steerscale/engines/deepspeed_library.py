"""DeepSpeed, imported late and kept within bounds.

Importing it costs half a second, sets an environment variable and puts a logger on standard output; using it fills
module-level variables with process groups. Here all of that is done when an engine is built and undone when it is closed, so
that neither a run without DeepSpeed nor the next engine of the process notices anything.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from steerscale.errors import LaunchError
from steerscale.parallel.context import ParallelContext

ENVIRONMENT = ("PYTORCH_NVML_BASED_CUDA_CHECK", "DS_ACCELERATOR", "LOCAL_RANK")
"""What DeepSpeed sets or needs; put back when the engine is closed."""


@contextlib.contextmanager
def deepspeed_library(context: ParallelContext) -> Iterator[Any]:
    """The package `deepspeed`, ready for engines on the process group that is there.

    Contexts may lie within each other, where several engines train side by side: the outermost one tidies up.
    Raises LaunchError if it is not installed, or too old.
    """
    outermost = False
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    try:
        library = _import(context.device)
        # What DeepSpeed takes for the number of the rank's device, whichever of them are visible to it.
        os.environ["LOCAL_RANK"] = str(context.device.index or 0)
        outermost = not library.comm.is_initialized()
        with quiet():
            library.comm.init_distributed(dist_init_required=False)
        yield library
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if outermost:
            _forget_groups()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What DeepSpeed prints and logs while it builds an engine is for its developers; errors are shown."""
    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", module=r"deepspeed\.")
            # torch renamed two collectives that DeepSpeed calls by their old names.
            warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated")
            yield
    finally:
        log.setLevel(level)


def _import(device: torch.device) -> Any:
    try:
        with quiet():
            if device.type == "cpu":
                os.environ["DS_ACCELERATOR"] = "cpu"  # by itself it would look for one, and warn that it found none
            library = importlib.import_module("deepspeed")
            # Its own handler writes to what was standard output when it was imported: ours write to the rank's log.
            log = logging.getLogger("DeepSpeed")
            log.handlers.clear()
            log.propagate = True
            _import_muon()
            # Shared-memory collectives serve inference only, and would be compiled on the spot.
            importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError as error:
        raise LaunchError(
            f"engine.name=deepspeed needs the package deepspeed ({error}): pip install 'steerscale[deepspeed]', or use "
            "engine=megatron"
        ) from error
    return library


def _import_muon() -> None:
    """Import the Muon optimizer, which ZeRO asks whether ours is one, without its decorator that compiles it.

    torch.compile costs seconds here, and trips over the CPU redirection of `parallel.cpu`.
    """
    compiling = torch.compile
    torch.compile = lambda model=None, **settings: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiling


def _forget_groups() -> None:
    """Empty DeepSpeed's module-level variables: what is of a process group that is gone must not meet the next one."""
    with contextlib.suppress(ImportError):
        comm: Any = importlib.import_module("deepspeed.comm.comm")
        groups = importlib.import_module("deepspeed.utils.groups")
        groups._release_process_group_references()
        comm.cdb = None
        # ZeRO-3 numbers modules for as long as the process lives, and compares the numbers with other ranks'.
        offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
        offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
        offload.FWD_MODULE_STACK.clear()
        importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init.param_id = 0
