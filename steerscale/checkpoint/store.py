"""Checkpoint directories: whole or not there.

    checkpoints/step_00000100/   index.json, state.json, rank_00000.safetensors ..., manifest.json
    checkpoints/latest           name of the newest one, for people and scripts

A checkpoint is written into a hidden directory; `manifest.json` with sizes and SHA-256 sums comes last; then the directory is
renamed. What a crash leaves is hidden, never mistaken for a checkpoint, and removed by the next start. On reading, sizes and
sums are checked; a damaged checkpoint is named and the one before it used. See docs/checkpoints.md.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steerscale import __version__
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.fragments import Fragment, FragmentReader, write_fragments, write_index
from steerscale.checkpoint.integrity import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    PREFIX,
    STATE,
    checkpoints,
    describe_file,
    find_damage,
    step_of,
)
from steerscale.errors import CheckpointError
from steerscale.rundir import write_text

__all__ = ["PREFIX", "CheckpointStore", "checkpoints", "find_damage", "load_state", "step_of"]

logger = logging.getLogger(__name__)

LATEST, HIDDEN = "latest", ".writing_"


@dataclass
class _Outcome:
    """What became of a rank's part: other ranks wait for word of it, so an error is a value."""

    value: Any = None
    error: str | None = None

    def attempt(self, action: Callable[[], Any]) -> "_Outcome":
        """Run `action` and remember its result or its error."""
        try:
            self.value = action()
        except Exception as error:  # noqa: BLE001 - safetensors wraps OSErrors in its own type; memory may run out
            self.error = f"{type(error).__name__}: {error}"
        return self


@dataclass
class _Pending:
    """A checkpoint that a thread is writing."""

    thread: threading.Thread
    step: int
    outcome: _Outcome = field(default_factory=_Outcome)


class CheckpointStore:
    """Writes and finds checkpoints of one run. Every method is called by all ranks together."""

    newest_step: int | None = None
    """Step of the newest checkpoint that was written, or found by `latest`."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory, self.config = directory, config
        self._pending: _Pending | None = None
        self._damaged: set[str] = set()
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
        prepared = _Outcome().attempt(lambda: self._prepare(step, fragments, state))
        # Nobody writes before rank 0 has made the directory.
        if not self._agree(step, prepared):
            return False
        own, path = prepared.value, self._hidden(step) / f"rank_{dist.get_rank():05d}.safetensors"
        outcome = _Outcome()
        thread = threading.Thread(target=outcome.attempt, args=(lambda: _write_rank(own, path),))
        self._pending = _Pending(thread=thread, step=step, outcome=outcome)
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
        written = self._agree(pending.step, pending.outcome, then=lambda parts: self._publish(pending.step, parts))
        self.newest_step = pending.step if written else self.newest_step
        return written

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint; None if none was ever written. Ranks share the work of reading.

        Damaged ones are named in the log and passed over. Raises CheckpointError if there is nothing but damaged ones: to
        begin anew, and overwrite them, is the user's decision.
        """
        listed: list[Any] = [None, None]
        if dist.get_rank() == 0:
            listed = [[path.name for path in checkpoints(self.directory)], _read_pointer(self.directory)]
        dist.broadcast_object_list(listed, src=0)
        names, pointer = listed
        problems = []
        if pointer is not None and pointer not in names:
            problems.append(f"{pointer}: it is missing, although {LATEST} names it")
            logger.error("checkpoint %s is missing, although %s names it", self.directory / pointer, LATEST)
        for name in reversed(names):
            problem = self._find_damage(name)
            if problem is None:
                self.newest_step = step_of(self.directory / name)
                return self.directory / name
            problems.append(f"{name}: {problem}")
            self._damaged.add(name)
            logger.error("checkpoint %s is damaged (%s); trying the one before it", self.directory / name, problem)
        if problems:
            raise CheckpointError(
                f"{self.directory} holds no usable checkpoint: {'; '.join(problems)}. Put a copy of a whole one there, or "
                "choose another run_dir, or remove this directory to begin anew from step 0"
            )
        return None

    def _hidden(self, step: int) -> Path:
        return self.directory / f"{HIDDEN}{step:08d}"

    def _find_damage(self, name: str) -> str | None:
        """What any rank found in its share of the files."""
        share = (dist.get_rank(), dist.get_world_size())
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, find_damage(self.directory / name, verify=self.config.verify, share=share))
        return next((problem for problem in problems if problem is not None), None)

    def _prepare(
        self, step: int, fragments: Callable[[], Sequence[Fragment]], state: dict[str, Any]
    ) -> Sequence[Fragment]:
        """This rank's fragments: copies if training goes on while they are written."""
        if dist.get_rank() == 0:
            hidden = self._hidden(step)
            if hidden.exists():
                shutil.rmtree(hidden)
            hidden.mkdir()
            (hidden / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        own = fragments()
        if not self.config.asynchronous:
            return own
        return [replace(part, data=part.data.to("cpu", copy=True)) for part in own]

    def _agree(
        self, step: int, outcome: _Outcome, *, then: Callable[[list[Any]], object] = lambda values: None
    ) -> bool:
        """Whether all ranks succeeded, and `then`, on rank 0, with their values; if not, say why and clean up.

        A gather to rank 0 (with index entries: about 200 bytes a fragment) and a broadcast of one flag.
        """
        first = dist.get_rank() == 0
        outcomes: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(outcome, outcomes, dst=0)
        verdict = [True]
        if outcomes is not None:
            error = next((f"rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error is not None), None)
            if error is None:
                error = _Outcome().attempt(lambda: then([o.value for o in outcomes])).error
            if error is not None:
                self._give_up(step, error)
            verdict = [error is None]
        dist.broadcast_object_list(verdict, src=0)
        return verdict[0]

    def _give_up(self, step: int, error: str) -> None:
        shutil.rmtree(self._hidden(step), ignore_errors=True)
        older = ", ".join(path.name for path in checkpoints(self.directory)) or "there are none"
        logger.error("the checkpoint of step %d was not written: %s; older ones are untouched: %s", step, error, older)

    def _publish(self, step: int, parts: list[dict[str, Any]]) -> None:
        """Rank 0: index, manifest, rename, pointer, retention."""
        hidden, final = self._hidden(step), self.directory / f"{PREFIX}{step:08d}"
        write_index((entry for part in parts for entry in part["entries"]), hidden)
        files = {name: info for part in parts for name, info in part["files"].items()}
        for name in (INDEX, STATE):
            files[name] = describe_file(hidden / name)
        manifest = {"format_version": FORMAT_VERSION, "steerscale": __version__, "step": step, "files": files}
        write_text(hidden / MANIFEST, json.dumps(manifest, indent=1))
        _sync_directory(hidden)
        if final.exists():  # a run that went back to an older checkpoint writes this step again
            _remove(final)
        hidden.rename(final)
        _sync_directory(self.directory)
        self._damaged.discard(final.name)
        logger.info("checkpoint of step %d written to %s", step, final)
        try:
            write_text(self.directory / LATEST, final.name + "\n")
            self._retire()
        except OSError as error:
            logger.warning("the checkpoint of step %d is whole, but tidying up after it failed: %s", step, error)

    def _retire(self) -> None:
        """Remove the oldest; damaged ones do not count, and stay for whoever wants to look into them."""
        if not self.config.keep:
            return
        every = self.config.keep_every
        whole = [path for path in checkpoints(self.directory) if path.name not in self._damaged]
        for old in whole[: -self.config.keep]:
            if every is None or step_of(old) % every:
                _remove(old)


def load_state(checkpoint: Path) -> tuple[dict[str, Any], FragmentReader]:
    """The run's state and a reader of its tensors. Called by any rank alone."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
    return state, FragmentReader(checkpoint)


def _write_rank(fragments: Sequence[Fragment], path: Path) -> dict[str, Any]:
    entries = write_fragments(fragments, path)
    shutil.copymode(path.with_name(STATE), path)  # safetensors lets nobody else read; run directories are shared
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"entries": entries, "files": {path.name: describe_file(path)}}


def _remove(checkpoint: Path) -> None:
    """Renamed first: a removal that is cut short must not leave half a checkpoint."""
    doomed = checkpoint.with_name(HIDDEN + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read_pointer(directory: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (directory / LATEST).read_text(encoding="utf-8").strip() or None
    return None


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
