"""Everything a run reports, written from one place: metrics.jsonl, TensorBoard, optionally W&B, and the console.

`metrics.jsonl` is the record; the others show it. One JSON object a line, told apart by "kind":

    train   every metrics.interval steps          eval   an evaluation
    skip    a step that was not applied           start  the process began (or resumed) at a step
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LEGACY_TFLOPS = "iteration-time/TFLOPs per gpu (estimated)"
LEGACY_SECONDS = "iteration-time/iteration-time"
"""Tags under which OpenGPT-X's dashboards look; the formula behind the first is `planning.flops.legacy_flops`."""

logger = logging.getLogger(__name__)


class Recorder:
    """Writes records; made on every rank, but only rank 0's has anywhere to write to."""

    def __init__(
        self,
        run_dir: Path,
        *,
        writes: bool,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config_text: str = "",
        step: int = 0,
        evaluated: bool = True,
        name: str = "",
    ) -> None:
        """`step` is where the run begins: what later steps recorded, left by a killed process, is dropped. So is an
        evaluation at this step if it is still to come (not `evaluated`).
        """
        self._lines: _Lines | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not writes:
            return
        path = run_dir / "metrics.jsonl"
        _truncate(path, step, evaluated=evaluated)
        self._lines = _Lines(path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Makes TensorBoard hide later events that a killed process left: at step 0 too, it may have died before
            # its first checkpoint.
            self._tensorboard = SummaryWriter(str(run_dir / "tb"), purge_step=step + 1)
            self._show(lambda: self._tensorboard.add_text("config", f"```yaml\n{config_text}\n```", step))
        if wandb_project is not None:
            import wandb

            self._wandb = wandb.init(project=wandb_project, name=name, dir=str(run_dir), resume="allow")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a record. Values that are not finite are written as null, since JSON has no word for them."""
        if self._lines is None:
            return
        record = {
            "kind": kind,
            "step": step,
            "time": round(time.time(), 3),
            **{k: _plain(v) for k, v in values.items()},
        }
        self._lines.append(json.dumps(record))
        scalars = {name: value for name, value in _scalars(kind, record) if value is not None}
        for tag, value in scalars.items():
            self._show(lambda tag=tag, value=value: self._tensorboard.add_scalar(tag, value, step))
        self._show(lambda: self._tensorboard.flush())  # a killed process would leave a gap before its last checkpoint
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._show(lambda: self._tensorboard.close())
        if self._lines is not None:
            self._lines.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _show(self, action: Callable[[], object]) -> None:
        """Do something with TensorBoard, if it is on; the first error (a full disk, say) turns it off, not the run."""
        if self._tensorboard is None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever its writing thread met comes up here
            self._tensorboard = None
            logger.warning("TensorBoard events are not written any more: %s", error)


class _Lines:
    """A file of whole lines, even where the disk runs full: what does not fit is kept and written later, with a warning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()
        self._waiting: list[bytes] = []

    def append(self, line: str) -> None:
        """Write a line now if possible."""
        self._waiting.append(line.encode() + b"\n")
        try:
            data = b"".join(self._waiting)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(self._end)
            if len(self._waiting) == 1:
                logger.warning("%s cannot be written, its records wait in memory: %s", self._path, error)
            return
        self._end = self._file.tell()
        self._waiting.clear()

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        self._file.close()
        if self._waiting:
            logger.error("%s lacks its last %d records: the disk was full", self._path, len(self._waiting))


def console_line(record: Mapping[str, Any], *, steps: int) -> str:
    """One line a log interval: what people watch while a run is going."""
    step = record["step"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
    ]
    parts += [f"{name} {value:.4g}" for name, value in _over_saes(record.get("metrics", {})).items()]
    if record.get("seconds_per_step"):
        parts.append(f"{format_seconds(record['seconds_per_step'])}/step")
    if record.get("tokens_per_second_per_gpu"):
        parts.append(f"{record['tokens_per_second_per_gpu']:,.0f} tok/s/rank")
    if record.get("model_tflops_per_gpu"):
        parts.append(f"{record['model_tflops_per_gpu']:.3g} TFLOP/s/rank")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("skipped_total"):
        parts.append(f"skipped {record['skipped_total']}")
    if record.get("eta_seconds") is not None:
        parts.append(f"ETA {format_duration(record['eta_seconds'])}")
    return "  ".join(parts)


def evaluation_lines(values: Mapping[str, float]) -> list[str]:
    """A line of figures; of several SAEs a line each, begun with its name."""
    lines: dict[str, list[str]] = {}
    for key, value in values.items():
        name, _, what = key.rpartition("/")
        lines.setdefault(name, []).append(f"{what.replace('_', ' ')} {value:,.4g}")
    return [f"{name}: {'  '.join(parts)}" if name else "  ".join(parts) for name, parts in lines.items()]


def _over_saes(metrics: Mapping[str, float]) -> dict[str, float]:
    """What matters most of SAEs, as means over all of them."""
    means = {}
    for name in ("fvu", "l0", "dead"):
        values = [value for key, value in metrics.items() if key.endswith(f"/{name}") and value is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def format_seconds(seconds: float) -> str:
    """A short time with a sensible unit."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_duration(seconds: float) -> str:
    """A long time as people say it."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def read_records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a run directory, of one kind or all; a last line cut short by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if kind is None or (isinstance(record, dict) and record.get("kind") == kind):
            records.append(record)
    return records


def _truncate(path: Path, step: int, *, evaluated: bool) -> None:
    """Cut off records after `step`: a resumed run writes them again, and nobody should see a step twice.

    Records are in the order of their steps, so that cutting is enough: it needs no space and leaves nothing half done.
    """
    if not path.is_file():
        return
    keep = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                record = json.loads(line)
                later = record["step"] > step or (record["step"] == step and record["kind"] == "eval" and not evaluated)
            except (ValueError, KeyError, TypeError):
                later = not line.endswith(b"\n")  # cut short by a crash; anything else that is no record is not ours
            if later:
                break
            keep += len(line)
        file.truncate(keep)


_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad norm",
    "lr": "train/learning rate",
    "loss_scale": "train/loss scale",
    "skipped_total": "train/skipped steps",
    "consumed_samples": "train/consumed samples",
    "global_batch_size": "train/global batch size",
    "seconds_per_step": LEGACY_SECONDS,
    "legacy_tflops_per_gpu": LEGACY_TFLOPS,
    "model_tflops_per_gpu": "throughput/model TFLOPs per GPU",
    "hardware_tflops_per_gpu": "throughput/hardware TFLOPs per GPU",
    "mfu": "throughput/MFU",
    "hfu": "throughput/HFU",
    "tokens_per_second_per_gpu": "throughput/tokens per second per GPU",
    "samples_per_second": "throughput/samples per second",
    "bubble_fraction": "throughput/pipeline bubble (estimated)",
    "memory_peak_gib_min": "memory/peak GiB, lowest rank",
    "memory_peak_gib_max": "memory/peak GiB, highest rank",
}


def _scalars(kind: str, record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    if kind == "eval":
        names = ("loss", "perplexity", "bits_per_byte")
        of_saes = [(f"sae held-out/{key}", value) for key, value in record.items() if "/" in key]
        return [(f"valid/{name.replace('_', ' ')}", record[name]) for name in names if name in record] + of_saes
    if kind != "train":
        return []
    tags = [(tag, record[name]) for name, tag in _TAGS.items() if name in record]
    tags += [(f"sae/{name}", value) for name, value in record.get("metrics", {}).items()]
    sections = {**record.get("seconds", {}), **record.get("seconds_between_steps", {})}
    return tags + [(f"time/{name}", value) for name, value in sections.items()]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
