"""Traces of torch's profiler read as JSON: where the time of a step went. Torch-free.

A step is the event `ProfilerStep#N`. Its time is shared out so that no moment counts twice and nothing is left over:

- on CPU, the innermost operation that the step's own thread was in; what lies in none is Python (and waiting);
- on CUDA, what ran on the device; where several kernels ran at once, compute comes before communication, so that
  "communication" is what was not hidden; what ran on no stream is idle.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerscale.errors import DataError

DIRECTORY = "profile"
"""In a run directory."""
SUFFIX = ".pt.trace.json.gz"
"""What TensorBoard's profiler plugin looks for; before it stands WORKER.NUMBER."""
CATEGORIES = ("GEMM", "attention", "optimizer", "other compute", "communication", "idle")
"""In the order in which kernels that run at once are counted; on CPU, idle is Python."""

_RULES = (
    (
        "communication",
        r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_coalesced|ProcessGroup",
    ),
    ("attention", r"scaled_dot_product|flash|fmha|attention"),
    ("GEMM", r"(^|::|_)(add)?(b|ba)?d?d?mm(_|$|\b)|matmul|linear$|gemm|cutlass|cublas|wgmma|nvjet|xmma|mkldnn_linear"),
    ("optimizer", r"adam|Optimizer\.step|multi_tensor"),
)
_PATTERNS = tuple((category, re.compile(pattern, re.IGNORECASE)) for category, pattern in _RULES)
_PRODUCTS = {
    **dict.fromkeys(("aten::mm", "aten::bmm"), (0, 1)),
    **dict.fromkeys(("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"), (1, 2)),
}
"""Matrix products and which of their operands are the matrices. With `_` they add to a buffer, as `parallel.main_grad` does."""
_SYNCHRONISATIONS = re.compile(r"cuda\w*Synchronize|aten::_local_scalar_dense")


def step_name(step: int) -> str:
    """The name of a step's event: TensorBoard's plugin knows steps by it."""
    return f"ProfilerStep#{step}"


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One step of one rank."""

    rank: int
    step: int
    on_cuda: bool
    seconds: float
    parts: dict[str, float]
    """Seconds by category, in all `seconds`."""
    hidden_communication: float
    """CUDA: seconds of communication behind compute, in no part."""
    gemm_flops: float | None
    """Of all matrix products, by their operands' shapes; None: the trace has no shapes."""
    synchronisations: dict[str, int]
    """CUDA: calls that made the host wait for the device, or read a number from it."""
    longest: list[tuple[str, str, float]]
    """Category, name and seconds of what took longest."""


def category_of(name: str) -> str:
    """The category of an operation or a kernel by its name."""
    return next((category for category, pattern in _PATTERNS if pattern.search(name)), "other compute")


def find_traces(run_dir: Path) -> list[Path]:
    """The traces of a run, by rank and step. Raises DataError if there are none."""
    directory = run_dir / DIRECTORY
    found = [path for path in directory.glob(f"rank*{SUFFIX}") if _place(path) is not None]
    if not found:
        raise DataError(
            f"{run_dir} has no traces: run with profile.steps=[10,11] (and profile.ranks=[0,...]), which writes them to "
            f"{directory}"
        )
    return sorted(found, key=lambda path: _place(path) or (0, 0))


def read_trace(path: Path) -> StepTrace:
    """Read and add up one trace. Raises DataError naming the file if it is none of ours."""
    place = _place(path)
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
        if place is None:
            raise ValueError(f"its name is not rankN.STEP{SUFFIX}")
        return _add_up(events, rank=place[0], step=place[1])
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a trace of torch's profiler: {type(error).__name__}: {error}"
        ) from error


def _place(path: Path) -> tuple[int, int] | None:
    found = re.fullmatch(r"rank(\d+)\.(\d+)" + re.escape(SUFFIX), path.name)
    return None if found is None else (int(found[1]), int(found[2]))


@dataclass(frozen=True)
class _Span:
    begin: float
    end: float
    category: str
    name: str


def _add_up(events: Sequence[dict[str, Any]], *, rank: int, step: int) -> StepTrace:
    steps = [e for e in events if e["name"] == step_name(step) and e.get("cat") == "user_annotation"]
    if len(steps) != 1:
        raise ValueError(f"{step_name(step)} is in it {len(steps)} times")
    (whole,) = steps
    begin = whole["ts"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    # Kernels run after the host has gone on: the step ends with the last of them.
    end = max([begin + whole["dur"], *(e["ts"] + e["dur"] for e in kernels)])
    operations = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation") and begin <= e["ts"] < end]
    own = [e for e in operations if (e["pid"], e["tid"]) == (whole["pid"], whole["tid"]) and e is not whole]
    if kernels:
        spans = [_Span(e["ts"], e["ts"] + e["dur"], _of_kernel(e), e["name"]) for e in kernels]
        shared, hidden = _by_priority(spans)
    else:
        spans = list(_innermost(own))
        shared, hidden = _sums(spans), 0.0
    seconds = end - begin
    shared["idle"] = seconds - sum(shared.values())
    longest: Counter[tuple[str, str]] = Counter()
    for span in spans:
        longest[span.category, span.name] += span.end - span.begin  # type: ignore[assignment]
    syncs: Counter[str] = Counter()
    if kernels:  # on CPU the same operations wait for nothing
        syncs.update(e["name"] for e in events if begin <= e["ts"] < end and _SYNCHRONISATIONS.search(e["name"]))
    return StepTrace(
        rank=rank,
        step=step,
        on_cuda=bool(kernels),
        seconds=seconds / 1e6,
        parts={category: shared.get(category, 0.0) / 1e6 for category in CATEGORIES},
        hidden_communication=hidden / 1e6,
        gemm_flops=_gemm_flops(operations),
        synchronisations=dict(syncs.most_common()),
        longest=[(category, name, spent / 1e6) for (category, name), spent in longest.most_common(12)],
    )


def _of_kernel(event: dict[str, Any]) -> str:
    return "other compute" if event["cat"] != "kernel" else category_of(event["name"])


def _innermost(events: Iterable[dict[str, Any]]) -> Iterable[_Span]:
    """Pieces of time of one thread, each with the innermost operation; within an optimizer's step all is optimizer.

    Operations of a thread are nested.
    """
    stack: list[tuple[float, str, str]] = []  # end, category ("" : Python), name
    at = 0.0

    def until(moment: float) -> Iterable[_Span]:
        nonlocal at
        while stack:
            end, category, name = stack[-1]
            stop = min(end, moment)
            if stop > at and category:
                yield _Span(at, stop, category, name)
            at = max(at, stop)
            if end > moment:
                return
            stack.pop()
        at = max(at, moment)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        yield from until(event["ts"])
        category = _of_operation(event, inside=stack[-1][1] if stack else "")
        stack.append((event["ts"] + event["dur"], category, event["name"]))
    yield from until(float("inf"))


def _of_operation(event: dict[str, Any], *, inside: str) -> str:
    """The category of an operation within another one; "" is Python.

    What an optimizer or attention does is theirs, and a transpose inside of a matrix product is part of it. Names without
    `::` are nodes of autograd and functions in Python: their own time is nobody's arithmetic. Calls of our own compiled code
    are annotations, "steerscale::" and the function's name.
    """
    name = event["name"]
    if name.startswith("Optimizer.step"):
        return "optimizer"
    computes = event["cat"] == "cpu_op" or name.startswith("steerscale::")
    if not computes or "::" not in name or name.startswith("autograd::"):
        return inside if inside == "optimizer" else ""
    own = category_of(name)
    if own == "communication" or not inside:
        return own
    return inside if inside in ("optimizer", "attention") or own == "other compute" else own


def _by_priority(spans: Sequence[_Span]) -> tuple[dict[str, float], float]:
    """Time of each category where what comes first in `CATEGORIES` covers what comes later; hidden communication."""
    moments = sorted({moment for span in spans for moment in (span.begin, span.end)})
    changes: dict[float, Counter[str]] = defaultdict(Counter)
    for span in spans:
        changes[span.begin][span.category] += 1
        changes[span.end][span.category] -= 1
    running: Counter[str] = Counter()
    shared: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for moment, following in itertools.pairwise(moments):
        running.update(changes[moment])
        category = next((category for category in CATEGORIES if running[category] > 0), None)
        if category is not None:
            shared[category] += following - moment
            hidden += following - moment if category != "communication" and running["communication"] > 0 else 0.0
    return dict(shared), hidden


def _sums(spans: Iterable[_Span]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for span in spans:
        sums[span.category] += span.end - span.begin
    return dict(sums)


def _gemm_flops(operations: Iterable[dict[str, Any]]) -> float | None:
    """2 m k n of every matrix product, a batch of them counted each."""
    total, seen = 0.0, False
    for event in operations:
        places = _PRODUCTS.get(event["name"])
        dims = event.get("args", {}).get("Input Dims")
        if places is None or not dims:
            continue
        left, right = (dims[place] for place in places)
        flops = 2.0 * right[-1]
        for size in left:
            flops *= size
        total, seen = total + flops, True
    return total if seen else None
