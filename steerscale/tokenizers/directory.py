"""Directories that appear as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steerscale.errors import DataError
from steerscale.tokenizers.base import MANIFEST


@contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that takes its place when the block ends, and is removed if it fails.

    Args:
        target: must not exist, or be an empty directory.
        force: replace a `target` that holds a manifest, i.e. was written this way; anything else is never removed.

    Raises DataError before the block runs if `target` is in the way, or after it if something cannot be written.
    """
    _check_free(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target} cannot be made: {error.strerror}; choose another output directory") from error
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private
        _sync(temporary)
        # Someone may have written there meanwhile.
        _check_free(target, force=force)
        _replace(target, temporary)
    except OSError as error:
        raise DataError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(target: Path, *, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    ours = (target / MANIFEST).is_file()
    if not ours:
        raise DataError(f"{target} exists and was not written by steerscale: choose another output directory")
    if not force:
        raise DataError(f"{target} exists already: choose another output directory, or replace it with --force")


def _replace(target: Path, temporary: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(old / target.name)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)  # onto nothing, or onto an empty directory
    _sync_path(target.parent)


def _sync(directory: Path) -> None:
    # A rename may reach the disk before the contents do; after a power failure the name would then promise too much.
    for root, _, names in os.walk(directory):
        for name in names:
            _sync_path(Path(root) / name)
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
