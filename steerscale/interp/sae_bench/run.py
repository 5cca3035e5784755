"""SAEs side by side on the same tasks: sparse probing, absorption, spurious correlation removal, and how their decoders match.

Everything runs where the activations are: on the stage that owns the hook point, and is told to all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.interp.probes.activations import collect, encode_examples
from steerscale.interp.probes.labels import Example
from steerscale.interp.probes.run import ProbeConfig, make_task
from steerscale.interp.sae_bench.absorption import Absorption, absorption, first_letter_words
from steerscale.interp.sae_bench.matching import Matching, match_decoders
from steerscale.interp.sae_bench.scr import Removal, spurious_removal
from steerscale.interp.sae_bench.sparse_probing import SparseProbing, sparse_probing
from steerscale.interp.sources import SAESource
from steerscale.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure."""

    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(train=8000, test=2000))
    """Text, split and dense probes of sparse probing; `fit` and `seed` of everything."""
    ks: tuple[int, ...] = (1, 2, 5)
    """Latents of sparse probes."""
    absorption_words: int = 0
    """Words to read for absorption; 0: leave it out."""
    removed: tuple[int, ...] = (2, 5, 10, 20, 50)
    """Latents that are ablated in spurious correlation removal."""
    scr_texts: int = 2000
    """To read for that, at most."""

    def __post_init__(self) -> None:
        require(len(self.ks) > 0 and min(self.ks) > 0, f"ks must be positive numbers, got {list(self.ks)}")
        require(len(self.removed) > 0 and min(self.removed) > 0, f"removed must be positive, got {list(self.removed)}")
        require(self.absorption_words >= 0, f"absorption_words must not be negative, got {self.absorption_words}")
        require(self.scr_texts > 0, f"scr_texts must be positive, got {self.scr_texts}")


@dataclass
class BenchResult:
    """What was found about one SAE; empty where it was not asked for."""

    probing: list[SparseProbing] = field(default_factory=list)
    absorption: list[Absorption] = field(default_factory=list)
    removal: list[Removal] = field(default_factory=list)
    """The label kept and the spurious attribute removed, then the other way round."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {name: [one.values() for one in part] for name, part in vars(self).items() if part}


def run_bench(
    lm: LanguageModel,
    saes: Mapping[str, SAESource],
    config: BenchConfig,
    *,
    examples: Sequence[Example] = (),
    scr: Sequence[Example] = (),
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, BenchResult]:
    """A collective of all ranks, with the same result on each.

    Args:
        saes: by name; of autoencoders of one hook point each.
        examples: labelled text for sparse probing; scr: texts with `label` and `spurious`, of two values each.
    Raises:
        ConfigError: an SAE of several hook points or of another width than the model's.
        DataError: too little text, or other than two values.
    """
    for name, source in saes.items():
        sae = source.sae
        require(
            sae.hook_out is None and "+" not in source.hook and sae.d_in == sae.d_out == lm.model.d_model,
            f"{name} must be an autoencoder of one hook point of width {lm.model.d_model}: it reads width {sae.d_in} at "
            f"{source.hook} and writes width {sae.d_out}",
        )
    hooks = list(dict.fromkeys(source.hook for source in saes.values()))
    spared = max(source.spare_first for source in saes.values())
    bench = _Bench(
        lm, saes, hooks, replace(config.probe, drop_first=max(spared, config.probe.drop_first)), config, on_progress
    )
    found = {name: BenchResult() for name in saes}
    if examples:
        bench.probing(found, examples)
    if config.absorption_words:
        bench.absorption(found)
    if scr:
        bench.removal(found, scr)
    return found


class _Bench:
    def __init__(
        self,
        lm: LanguageModel,
        saes: Mapping[str, SAESource],
        hooks: Sequence[str],
        probe: ProbeConfig,
        config: BenchConfig,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self._lm, self._saes, self._hooks = lm, saes, hooks
        self._probe, self._config, self._say = probe, config, on_progress

    def _read(self, encoded: Any, what: str) -> dict[str, torch.Tensor]:
        return collect(
            self._lm, encoded, self._hooks, on_progress=lambda done, total: self._say(f"tokens for {what}", done, total)
        )

    def _each(self, what: str, activations: Mapping[str, torch.Tensor], measure: Callable[..., Any]) -> dict[str, Any]:
        """`measure(sae, activations)` by SAE. One all-gather of the figures over the ranks of a replica."""
        found = {}
        for number, (name, source) in enumerate(self._saes.items()):
            if source.hook in activations:
                found[name] = measure(source.sae, activations[source.hook])
            self._say(f"{what}, SAEs", number + 1, len(self._saes))
        group = self._lm.context.groups.mp
        if group.size() == 1:
            return found
        parts: list[dict[str, Any]] = [{} for _ in range(group.size())]
        dist.all_gather_object(parts, found, group=group)
        return {name: value for part in reversed(parts) for name, value in part.items()}

    def probing(self, found: Mapping[str, BenchResult], examples: Sequence[Example]) -> None:
        """Sparse probing."""
        task = make_task(self._lm, examples, self._probe)
        activations = self._read([*task.train.encoded, *task.test.encoded], "sparse probing")

        def measure(sae: Any, x_VM: torch.Tensor) -> list[SparseProbing]:
            return sparse_probing(sae, x_VM, task, ks=self._config.ks, fit=self._probe.fit, seed=self._probe.seed)

        for name, records in self._each("sparse probing", activations, measure).items():
            found[name].probing = records

    def absorption(self, found: Mapping[str, BenchResult]) -> None:
        """First letters."""
        encoded = first_letter_words(self._lm, words=self._config.absorption_words, seed=self._probe.seed)
        letters = [one.places[0].label for one in encoded]
        activations = self._read(encoded, "absorption")

        def measure(sae: Any, x_VM: torch.Tensor) -> list[Absorption]:
            return absorption(sae, x_VM, letters, fit=replace(self._probe.fit, per_coordinate=False))

        for name, records in self._each("absorption", activations, measure).items():
            found[name].absorption = records

    def removal(self, found: Mapping[str, BenchResult], examples: Sequence[Example]) -> None:
        """Spurious correlation removal, in both directions."""
        names = [sorted({str(getattr(one, part)) for one in examples}) for part in ("label", "spurious")]
        if any(one.label is None or one.spurious is None for one in examples) or any(len(part) != 2 for part in names):
            raise DataError(
                f"spurious correlation removal needs texts with two labels and two spurious values, got {names}"
            )
        both = [
            replace(one, label=f"{names[0].index(str(one.label))}{names[1].index(str(one.spurious))}")
            for one in examples
        ]
        encoded = encode_examples(
            self._lm,
            both[: self._config.scr_texts],
            position="all",
            vectors=self._config.scr_texts * self._lm.seq_len,
            drop_first=self._probe.drop_first,
        )
        cells = [one.places[0].label for one in encoded]
        texts_T = torch.tensor([row for row, one in enumerate(encoded) for _ in one.places])
        label_V, spurious_V = (torch.tensor([int(cell[part]) for cell in cells]) for part in (0, 1))
        activations = self._read(encoded, "spurious correlation removal")

        def measure(sae: Any, x_TM: torch.Tensor) -> list[Removal]:
            fit = replace(self._probe.fit, per_coordinate=False)
            options: dict[str, Any] = {"numbers": self._config.removed, "fit": fit}
            return [
                spurious_removal(sae, x_TM, texts_T, label_V, spurious_V, name=" or ".join(names[0]), **options),
                spurious_removal(sae, x_TM, texts_T, spurious_V, label_V, name=" or ".join(names[1]), **options),
            ]

        for name, records in self._each("spurious correlation removal", activations, measure).items():
            found[name].removal = records


def compare(saes: Mapping[str, SAESource]) -> dict[tuple[str, str], Matching]:
    """Every pair's decoders, by their names."""
    return {
        (first, second): match_decoders(saes[first].sae, saes[second].sae) for first, second in combinations(saes, 2)
    }
