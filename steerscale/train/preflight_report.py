"""What a preflight's figures mean: who is slow, who lacks memory, whose libraries differ. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from steerscale.planning.hardware import find_device


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank found."""

    rank: int
    host: str
    device: str
    """Name and index."""
    gemm_tflops: float
    """Matrix products, 1e12 FLOP/s."""
    gb_per_second: dict[str, float]
    """Bus bandwidth by kind of group, 1e9 bytes/s; groups of one are left out."""
    groups: dict[str, list[int]]
    """Ranks of these groups."""
    memory_free_gib: float
    """Of the device before the model is built; on a CPU what the host has available."""
    memory_total_gib: float
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that must agree."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Something far below the median of its kind."""

    what: str
    """Words for people: kind, ranks, host and device."""
    ranks: list[int]
    share: float
    """Of the median."""


def find_slow(results: Sequence[RankResult], *, below: float) -> list[Slow]:
    """Ranks whose products, and groups whose exchanges, reach less than `below` of the median of their kind."""
    slow = []
    middle = median(result.gemm_tflops for result in results)
    for result in results:
        if result.gemm_tflops < below * middle:
            what = f"matrix products on {_place(result)} at {result.gemm_tflops:.3g} TFLOP/s"
            slow.append(Slow(what=what, ranks=[result.rank], share=result.gemm_tflops / middle))
    places = {result.rank: result for result in results}
    for kind in results[0].gb_per_second:
        # The members of a group wait for each other and measure the same: the least of them speaks for all.
        groups: dict[tuple[int, ...], float] = {}
        for result in results:
            ranks = tuple(result.groups[kind])
            groups[ranks] = min(groups.get(ranks, float("inf")), result.gb_per_second[kind])
        middle = median(groups.values())
        for ranks, bandwidth in groups.items():
            if bandwidth < below * middle:
                hosts = ", ".join(dict.fromkeys(places[rank].host for rank in ranks))
                what = f"the {kind} group of ranks {', '.join(map(str, ranks))} on {hosts} at {bandwidth:.3g} GB/s"
                slow.append(Slow(what=what, ranks=list(ranks), share=bandwidth / middle))
    return slow


def summary(results: Sequence[RankResult], *, seconds: float) -> list[str]:
    """What was measured, in two lines."""
    gemms = sorted(result.gemm_tflops for result in results)
    device = find_device(results[0].device.rsplit(" ", 1)[0])
    share = f", {median(gemms) / device.bf16_tflops:.0%} of the peak" if device is not None else ""
    links = [
        f"{kind} {min(speeds):.3g} to {max(speeds):.3g}"
        for kind in results[0].gb_per_second
        if (speeds := [result.gb_per_second[kind] for result in results])
    ]
    hosts = len({result.host for result in results})
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    return [
        f"preflight of {len(results)} ranks on {hosts} host{'s' if hosts > 1 else ''} in {seconds:.2f} s: products "
        f"{gemms[0]:.3g} to {gemms[-1]:.3g} TFLOP/s (median {median(gemms):.3g}{share})"
        + (f"; bus bandwidth in GB/s: {', '.join(links)}" if links else ""),
        f"least free memory {min(result.memory_free_gib for result in results):.1f} GiB; {versions}",
    ]


def short_of_memory(results: Sequence[RankResult], *, planned_gib: float | None, on_cpu: bool) -> list[str]:
    """Devices with less free memory than the fullest rank is planned to need; `planned_gib` None: unknown."""
    if planned_gib is None:
        return []
    on_host = Counter(result.host for result in results)
    warnings: dict[object, str] = {}
    for result in results:
        # Ranks on a CPU share the memory of their host.
        where, needed = (result.host, planned_gib * on_host[result.host]) if on_cpu else (_place(result), planned_gib)
        free, total = result.memory_free_gib, result.memory_total_gib
        if free < needed:
            warnings[where] = (
                f"{where} has {free:.1f} of {total:.1f} GiB free, the plan needs {needed:.1f}: another process may hold "
                "the rest"
            )
    return list(warnings.values())


def disagreements(results: Sequence[RankResult]) -> list[str]:
    """Libraries of which not all ranks have the version that most have."""
    warnings = []
    for name in dict.fromkeys(name for result in results for name in result.versions):
        counts = Counter(result.versions.get(name, "none") for result in results)
        usual = counts.most_common(1)[0][0]
        others = [result for result in results if result.versions.get(name, "none") != usual]
        if others:
            version = others[0].versions.get(name, "none")
            warnings.append(
                f"{_place(others[0])} has {name} {version}, {counts[usual]} of {len(results)} ranks have {usual}"
            )
    return warnings


def _place(result: RankResult) -> str:
    return f"{result.host}, {result.device} (rank {result.rank})"
