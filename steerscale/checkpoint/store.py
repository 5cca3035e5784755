"""Checkpoint directories: whole or not there.

    checkpoints/step_00000100/   index.json, state.json, rank_00000.safetensors ..., manifest.json
    checkpoints/latest           name of the newest one

A checkpoint is written into a hidden directory; `manifest.json` with sizes and SHA-256 sums comes last; then the directory is
renamed. What a crash leaves is hidden, never mistaken for a checkpoint, and removed by the next start. On reading, sizes and
sums are checked; a damaged checkpoint is named and the one before it used.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steerscale import __version__
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.fragments import Fragment, FragmentReader, write_fragments, write_index
from steerscale.errors import CheckpointError
from steerscale.rundir import write_text

logger = logging.getLogger(__name__)

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
PREFIX, HIDDEN = "step_", ".writing_"
FORMAT_VERSION = 1


@dataclass
class _Pending:
    """A checkpoint that a thread is writing."""

    thread: threading.Thread
    step: int
    result: dict[str, Any]


class CheckpointStore:
    """Writes and finds checkpoints of one run. Every method is called by all ranks together, unless it says otherwise."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory, self.config = directory, config
        self._pending: _Pending | None = None
        if dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(f"{HIDDEN}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    def save(self, step: int, fragments: Callable[[], Sequence[Fragment]], state: dict[str, Any]) -> bool:
        """Write a checkpoint of `step`; with `asynchronous`, begin to, and let `poll` finish it.

        Returns False, having said why and removed what was written, if it could not be written (a full disk, say): older
        checkpoints are untouched, and the caller decides whether to go on.
        """
        self.wait()
        hidden = self.directory / f"{HIDDEN}{step:08d}"
        ready: dict[str, Any] = {}
        if dist.get_rank() == 0:
            ready = _attempt(lambda: self._prepare(hidden, state))
        if not self._agree(ready, step):
            return False
        own = list(fragments())
        if self.config.asynchronous:
            own = [Fragment(**{**vars(part), "data": part.data.to("cpu", copy=True)}) for part in own]
        path = hidden / f"rank_{dist.get_rank():05d}.safetensors"
        result: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: result.update(_attempt(lambda: _write_rank(own, path))))
        self._pending = _Pending(thread=thread, step=step, result=result)
        thread.start()
        return True if self.config.asynchronous else self.wait()

    def poll(self) -> None:
        """Finish an asynchronous checkpoint if every rank has written its part. One small all-reduce while one is pending."""
        if self._pending is None:
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        writing = torch.tensor([int(self._pending.thread.is_alive())], device=device)
        dist.all_reduce(writing)
        if not writing.item():
            self.wait()

    def wait(self) -> bool:
        """Finish what is being written; False if that failed."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        pending.thread.join()
        results = _gather(pending.result)
        if dist.get_rank() == 0 and not any("error" in result for result in results):
            published = _attempt(lambda: self._publish(pending.step, results))
        else:
            published = {}
        return self._agree({**pending.result, **published}, pending.step)

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint, or None. Damaged ones are named in the log and passed over."""
        chosen: list[str | None] = [None]
        candidates = sorted(self.directory.glob(f"{PREFIX}*"), reverse=True) if dist.get_rank() == 0 else []
        if dist.get_rank() == 0:
            for candidate in candidates:
                problem = find_damage(candidate, verify=self.config.verify)
                if problem is None:
                    chosen = [str(candidate)]
                    break
                logger.error("checkpoint %s is damaged (%s); trying the one before it", candidate, problem)
        dist.broadcast_object_list(chosen, src=0)
        return None if chosen[0] is None else Path(chosen[0])

    def _prepare(self, hidden: Path, state: dict[str, Any]) -> dict[str, Any]:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        (hidden / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        return {}

    def _publish(self, step: int, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Rank 0: index, manifest, rename, pointer, retention."""
        hidden = self.directory / f"{HIDDEN}{step:08d}"
        final = self.directory / f"{PREFIX}{step:08d}"
        write_index((entry for result in results for entry in result["entries"]), hidden)
        files = {name: info for result in results for name, info in result["files"].items()}
        for name in ("index.json", STATE):
            files[name] = describe_file(hidden / name)
        manifest = {"format_version": FORMAT_VERSION, "steerscale": __version__, "step": step, "files": files}
        write_text(hidden / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # a run that went back to an older checkpoint writes this step again
            shutil.rmtree(final)
        hidden.rename(final)
        _sync_directory(self.directory)
        write_text(self.directory / LATEST, final.name + "\n")
        self._retire()
        logger.info("checkpoint of step %d written to %s", step, final)
        return {}

    def _retire(self) -> None:
        if not self.config.keep:
            return
        every = self.config.keep_every
        steps = sorted(self.directory.glob(f"{PREFIX}*"))
        for old in steps[: -self.config.keep]:
            if every is None or step_of(old) % every:
                # Renamed first: a removal that is cut short must not leave half a checkpoint.
                doomed = old.with_name(HIDDEN + old.name)
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _agree(self, result: dict[str, Any], step: int) -> bool:
        """Whether all ranks succeeded; if not, say what happened and remove what was written."""
        errors = {rank: r["error"] for rank, r in enumerate(_gather(result)) if "error" in r}
        if errors and dist.get_rank() == 0:
            shutil.rmtree(self.directory / f"{HIDDEN}{step:08d}", ignore_errors=True)
            rank, error = next(iter(errors.items()))
            kept = ", ".join(path.name for path in sorted(self.directory.glob(f"{PREFIX}*"))) or "none"
            logger.error(
                "checkpoint of step %d was not written: rank %d: %s; older ones are intact: %s", step, rank, error, kept
            )
        return not errors


def load_state(checkpoint: Path) -> tuple[dict[str, Any], FragmentReader]:
    """The run's state and a reader of its tensors. Called by any rank alone."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
    return state, FragmentReader(checkpoint)


def find_damage(checkpoint: Path, *, verify: bool = True) -> str | None:
    """What is wrong with a checkpoint directory, or None. Torch and the network are not needed."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format version {manifest['format_version']}, this is version {FORMAT_VERSION}"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, info in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != info["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {info['bytes']}"
        if verify and describe_file(path)["sha256"] != info["sha256"]:
            return f"{name} has another SHA-256 sum than when it was written"
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_rank(fragments: Sequence[Fragment], path: Path) -> dict[str, Any]:
    entries = write_fragments(fragments, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"entries": entries, "files": {path.name: describe_file(path)}}


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run something that touches the disk; an error becomes a value, since other ranks wait for word of it."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - safetensors wraps OSErrors in its own type
        return {"error": f"{type(error).__name__}: {error}"}


def _gather(value: dict[str, Any]) -> list[dict[str, Any]]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
