"""What a checkpoint directory holds, and whether it is what was written. Needs neither torch nor the other ranks."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from steerscale.errors import CheckpointError

MANIFEST, STATE, INDEX = "manifest.json", "state.json", "index.json"
PREFIX = "step_"
FORMAT_VERSION = 1

_NAME = re.compile(rf"{PREFIX}(\d{{8,}})")


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoint directories there, damaged ones included, the oldest first. What has another name is not looked at."""
    found = [path for path in directory.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run, which may still be going on. Raises CheckpointError if there is none."""
    for candidate in reversed(checkpoints(run_dir / "checkpoints")):
        if find_damage(candidate, verify=False) is None:
            return candidate
    raise CheckpointError(f"{run_dir} holds no whole checkpoint: train it first, or name another run directory")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_damage(checkpoint: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint directory, or None.

    Args:
        verify: compare SHA-256 sums, not only sizes.
        share: (i, n) looks at every n-th file from the i-th on, so that n ranks can divide the reading among them.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return f"it has format version {manifest['format_version']}, this steerscale reads version {FORMAT_VERSION}"
        if manifest["step"] != step_of(checkpoint):
            return f"{MANIFEST} is of step {manifest['step']}"
        files = {str(name): (int(info["bytes"]), str(info["sha256"])) for name, info in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    if missing := {STATE, INDEX} - files.keys():
        return f"{MANIFEST} does not name {' and '.join(sorted(missing))}"
    first, step = share
    for name in sorted(files)[first::step]:
        problem = _compare(checkpoint / name, *files[name], verify=verify)
        if problem is not None:
            return problem
    return None


def _compare(path: Path, size: int, digest: str, *, verify: bool) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
        if verify and describe_file(path)["sha256"] != digest:
            return f"{path.name} has another SHA-256 sum than when it was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None
