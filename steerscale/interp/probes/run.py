"""Probes of many hook points and kinds on one task: passes over the text, fits, scores on held-out text, control tasks.

Shapes: V vectors, M d_model, C classes.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.interp.probes.activations import Encoded, collect, encode_examples, labels_of, types_of
from steerscale.interp.probes.control import control_labels
from steerscale.interp.probes.fit import FitConfig, fit_probe
from steerscale.interp.probes.labels import Example, split_examples
from steerscale.interp.probes.probe import KINDS, Probe, score
from steerscale.language_model import LanguageModel
from steerscale.models.hook_points import KINDS as HOOK_KINDS
from steerscale.models.hook_points import hook_point


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What to probe and on how much text."""

    kinds: tuple[str, ...] = ("logistic",)
    """Of `probes.KINDS`."""
    position: str = "last"
    """Which tokens of a labelled word or text, one of `probes.POSITIONS`."""
    train: int = 20_000
    """Vectors to fit on, at most."""
    test: int = 5_000
    """Held-out vectors, at most."""
    held_out: float = 0.2
    """Share of the examples that are kept for testing."""
    min_examples: int = 20
    """Labels with fewer vectors in training are left out."""
    drop_first: int = 1
    """First tokens of a sequence that are not read."""
    control: bool = True
    """Fit a control task beside each probe."""
    memory_gib: float = 4.0
    """For activations at a time; more hook points than fit take more passes over the text."""
    seed: int = 0
    """Of the split and the control task."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Of the probes."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            require(kind in KINDS, f"a probe's kind must be one of {', '.join(KINDS)}, got {kind!r}")
        require(
            len(set(self.kinds)) == len(self.kinds) > 0, f"kinds must be given once each, got {', '.join(self.kinds)}"
        )
        require(0 < self.held_out < 1, f"held_out must be between 0 and 1, got {self.held_out}")
        for name in ("train", "test", "min_examples"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.drop_first >= 0, f"drop_first must not be negative, got {self.drop_first}")
        require(self.memory_gib > 0, f"memory_gib must be positive, got {self.memory_gib}")


class Side(NamedTuple):
    """Training or held-out text."""

    encoded: list[Encoded]
    y_V: torch.Tensor
    """Labels; -1 where a vector is left out."""
    control_V: torch.Tensor
    """Labels of the control task."""


class ProbeTask(NamedTuple):
    """Text that is labelled, tokenized and split."""

    classes: tuple[str, ...]
    train: Side
    test: Side
    majority: float
    """Held-out accuracy of the most frequent class of training."""

    def about(self) -> dict[str, Any]:
        """Its figures, for records."""
        return {
            "train_vectors": int((self.train.y_V >= 0).sum()),
            "test_vectors": int((self.test.y_V >= 0).sum()),
            "classes": len(self.classes),
            "majority": self.majority,
        }


def make_task(lm: LanguageModel, examples: Sequence[Example], config: ProbeConfig) -> ProbeTask:
    """Split, tokenize, align. Raises DataError if fewer than two classes are left."""
    sides = split_examples(examples, seed=config.seed, held_out=config.held_out)
    train, test = (
        encode_examples(lm, side, position=config.position, vectors=vectors, drop_first=config.drop_first)
        for side, vectors in zip(sides, (config.train, config.test))
    )
    counts = Counter(place.label for one in train for place in one.places)
    classes = tuple(sorted(name for name, count in counts.items() if count >= config.min_examples))
    if len(classes) < 2:
        common = ", ".join(f"{name!r}: {count}" for name, count in counts.most_common(5))
        raise DataError(
            f"a probe needs two or more classes with at least {config.min_examples} vectors each in training; found {common}"
        )
    y_V = labels_of(train, classes)
    counts_C = torch.bincount(y_V[y_V >= 0], minlength=len(classes))
    found = []
    for encoded in (train, test):
        control_V = control_labels(types_of(encoded), counts_C, seed=config.seed)
        found.append(Side(encoded, labels_of(encoded, classes), control_V))
    test_V = found[1].y_V[found[1].y_V >= 0]
    if not len(test_V):
        raise DataError("held-out text has no vector of a class that training has: give more examples")
    return ProbeTask(classes, found[0], found[1], float((test_V == counts_C.argmax()).double().mean()))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run of probes is."""

    what: str
    done: int
    total: int


def run_probes(
    lm: LanguageModel,
    task: ProbeTask,
    hooks: Sequence[str],
    config: ProbeConfig,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Probe]:
    """Fit every kind at every hook point; a collective of all ranks, with the same result on each.

    The figures of a probe are in its `about`: accuracy, balanced_accuracy, ece, majority, seconds, and with a control task
    control_accuracy and selectivity. Tensor ranks share the fits of their stage.
    """
    require(len(set(hooks)) == len(hooks) > 0, f"hook points must be given once each, got {', '.join(hooks) or 'none'}")
    points = {hook: hook_point(hook, lm.model) for hook in hooks}
    ordered = sorted(hooks, key=lambda hook: (points[hook].layer, HOOK_KINDS.index(points[hook].kind)))
    vectors = len(task.train.y_V) + len(task.test.y_V)
    size = max(int(config.memory_gib * 2**30 / (4 * vectors * lm.model.d_model)), 1)
    groups = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    both, found = [*task.train.encoded, *task.test.encoded], []
    for number, group in enumerate(groups):

        def read(done: int, total: int, number: int = number) -> None:
            on_progress(Progress(what="tokens", done=number * total + done, total=len(groups) * total))

        activations = collect(lm, both, group, on_progress=read)
        mine = [
            hook for index, hook in enumerate(activations) if index % lm.context.layout.tensor == lm.context.at.tensor
        ]
        fitted = []
        for hook, kind in [(hook, kind) for hook in mine for kind in config.kinds]:
            fitted.append(_fit_one(activations[hook], task, hook, kind, config, lm.context.device))
            done = sum(len(part) for part in groups[:number]) * len(config.kinds) + len(fitted) * len(group) // len(
                mine
            )
            on_progress(Progress(what="probes", done=done, total=len(ordered) * len(config.kinds)))
        found += _gather(lm, fitted)
    place = {(hook, kind): (ordered.index(hook), config.kinds.index(kind)) for hook in hooks for kind in config.kinds}
    return sorted(found, key=lambda probe: place[probe.hook, probe.kind])


def _gather(lm: LanguageModel, mine: list[Probe]) -> list[Probe]:
    """All ranks' probes on each. An all-gather of their weights over the ranks of a replica."""
    group = lm.context.groups.mp
    if group.size() == 1:
        return mine
    parts: list[list[Probe]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, [probe.to("cpu") for probe in mine], group=group)
    return [probe for part in parts for probe in part]


def _fit_one(
    x_VM: torch.Tensor, task: ProbeTask, hook: str, kind: str, config: ProbeConfig, device: torch.device
) -> Probe:
    begin = time.perf_counter()
    (train, test), keep = x_VM.split([len(task.train.y_V), len(task.test.y_V)]), []
    for x, side in zip((train, test), task[1:3]):
        keep.append((x[side.y_V >= 0].to(device), side.y_V[side.y_V >= 0].to(device)))
    (train_VM, train_V), (test_VM, test_V) = keep
    probe = fit_probe(
        train_VM, train_V, task.classes, hook=hook, kind=kind, position=config.position, config=config.fit
    )
    about = {**task.about(), **score(probe.logits(test_VM), test_V).values(), "seconds": time.perf_counter() - begin}
    if config.control:
        # Types may leave a label of the real task without an example: the control probe then knows fewer.
        labels = [side.control_V[side.y_V >= 0].to(device) for side in task[1:3]]
        there = torch.unique(labels[0])
        names = tuple(task.classes[index] for index in there.tolist())
        if len(there) > 1:
            own = torch.searchsorted(there, labels[0])
            control = fit_probe(train_VM, own, names, hook=hook, kind=kind, config=config.fit)
            accuracy = float((there[control.logits(test_VM).argmax(dim=1)] == labels[1]).double().mean())
            about |= {"control_accuracy": accuracy, "selectivity": about["accuracy"] - accuracy}
    return replace(probe, about=about)


def expand_hooks(patterns: Sequence[str], lm: LanguageModel) -> list[str]:
    """Hook points from names, `all` (the embedding and every block's output) or `every:N` of those.

    Raises ConfigError with the nearest name for one the model has not.
    """
    return list(dict.fromkeys(hook for pattern in patterns for hook in _expand(pattern, lm.model.num_layers)))


def _expand(pattern: str, num_layers: int) -> Iterator[str]:
    step = "1" if pattern == "all" else pattern.removeprefix("every:") if pattern.startswith("every:") else None
    if step is None:
        yield pattern
        return
    require(step.isdigit() and int(step) > 0, f"--hooks every:N needs a positive N, got {pattern!r}")
    yield "blocks.0.hook_resid_pre"
    yield from (f"blocks.{layer}.hook_resid_post" for layer in range(int(step) - 1, num_layers, int(step)))
