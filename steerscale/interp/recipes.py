"""Recipes: what is to be changed in a language model, as a YAML file that can be kept, shared and served.

    model: runs/smollm2                  # where the SAE does not bring its own
    saes:
      - path: runs/smollm2_sae
        name: blocks.15.hook_resid_post@k=64
        edits:
          - {latent: 2791, target: 0.4}
          - {latent: 15, scale: 0, when: {latent: 2791, above: 0.1}}
    directions:
      - {hook: blocks.15.hook_resid_post, file: formal.safetensors, strength: 4}
    probes:
      - {path: runs/language_probes, kind: logistic, do: set, target: de, value: 3}
    strength: 1.0

Everything acts at once. What belongs to one hook point acts in this order (saes, directions, probes), each on what the
one before it has left. Paths are relative to where the command runs, as in all configuration.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from steerscale.config import from_mapping, load_yaml, require
from steerscale.errors import ConfigError, DataError
from steerscale.interp.combine import chained, weighted
from steerscale.interp.interventions import add_direction, project_out
from steerscale.interp.probes.edit import probe_edit
from steerscale.interp.probes.probe import Probe, read_probe
from steerscale.interp.sources import SAESource, open_sae
from steerscale.interp.steering import Edit, Steering, When
from steerscale.language_model import LanguageModel
from steerscale.models.hook_points import hook_point
from steerscale.models.hooks import HookFunction

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class EditRecipe:
    """What becomes of one latent; exactly one of target, add and scale."""

    latent: int
    """Its number in the SAE."""
    target: float | None = None
    """The value it gets, in units of the latent's values."""
    add: float | None = None
    """What is added to its value, which does not fall below 0."""
    scale: float | None = None
    """Factor of its value; 0 suppresses it."""
    strength: float = 1.0
    """Factor of the change."""
    only_active: bool = False
    """Only at tokens where the latent is active."""
    when: When | None = None
    """Only where another latent's value is above a threshold: {latent: 12, above: 0.1}."""

    def __post_init__(self) -> None:
        given = [name for name in ("target", "add", "scale") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"the edit of latent {self.latent} needs exactly one of target, add and scale, got {' and '.join(given) or 'none'}",
        )

    def edit(self) -> Edit:
        """For `Steering`."""
        name = next(name for name in ("target", "add", "scale") if getattr(self, name) is not None)
        modes: dict[str, Literal["clamp", "add", "scale"]] = {"target": "clamp", "add": "add", "scale": "scale"}
        return Edit(
            latent=self.latent,
            value=getattr(self, name),
            mode=modes[name],
            where="active" if self.only_active else "all",
            when=self.when,
            strength=self.strength,
        )


@dataclass(frozen=True, kw_only=True)
class SAERecipe:
    """Latents of one SAE."""

    path: str
    """A run of SAEs, or the directory of one in a public format."""
    edits: list[EditRecipe]
    """What becomes of its latents; each may be there once."""
    name: str | None = None
    """Which one, if the run trained several."""
    hook: str | None = None
    """Where it belongs; null: where it says."""

    def __post_init__(self) -> None:
        require(bool(self.edits), f"the SAE {self.path} has no edits: give at least one, like {{latent: 7, target: 2}}")


@dataclass(frozen=True, kw_only=True)
class DirectionRecipe:
    """A vector of the residual stream: of activation addition, a difference of means, a probe."""

    hook: str
    """Where it acts, like blocks.3.hook_resid_post."""
    file: str
    """A safetensors file."""
    tensor: str | None = None
    """Its name there; null: the only one."""
    do: Literal["add", "project_out"] = "add"
    """Add it, as long as it is, or remove the part of the activation along it."""
    strength: float = 1.0
    """Factor of the change."""


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """An edit by a linear probe; see `probe_edit`."""

    path: str
    """Directory of probes, as `steerscale probe` writes it."""
    hook: str | None = None
    """Which of them: its hook point; null: there is one only."""
    kind: str | None = None
    """Which of them: logistic, ridge, diff_means or mass_mean; null: there is one only."""
    do: Literal["add", "project", "set", "swap"] = "set"
    """Add a class's direction, remove what tells classes apart, set the margin of a class, or swap two classes."""
    target: str | None = None
    """The class."""
    other: str | None = None
    """The class that it is compared or swapped with."""
    value: float = 0.0
    """Of add, in distances between the classes' means; of set, the margin in the probe's logits."""
    where: str | None = None
    """Only at tokens that the probe takes for this class."""
    strength: float = 1.0
    """Factor of the change."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Interventions in a language model, all at once."""

    description: str = ""
    """For people."""
    model: str | None = None
    """Language model: run or Hugging Face directory; null: the first SAE's own."""
    checkpoint: str | None = None
    """Of `model`, if it is a run and not to be its newest."""
    saes: list[SAERecipe] = field(default_factory=list)
    """Latents to steer."""
    directions: list[DirectionRecipe] = field(default_factory=list)
    """Vectors to add or to project out."""
    probes: list[ProbeRecipe] = field(default_factory=list)
    """Edits by linear probes."""
    strength: float = 1.0
    """Factor of all changes; 0 changes nothing."""
    spare_special: bool | None = None
    """Leave begin, end, padding and unknown tokens as they are; null: as the SAE was trained, else yes."""
    spare_first: int | None = None
    """Leave so many first positions as they are; null: what the SAE was not trained on, else 0."""

    def __post_init__(self) -> None:
        require(
            bool(self.saes or self.directions or self.probes),
            "the recipe changes nothing: give saes, directions or probes",
        )
        require(self.spare_first is None or self.spare_first >= 0, f"spare_first must be >= 0, got {self.spare_first}")
        require(
            self.checkpoint is None or self.model is not None,
            f"checkpoint {self.checkpoint} chooses among a run's, but the recipe names no model",
        )

    def open(self, *, model: Path | None = None) -> "OpenRecipe":
        """Read its SAEs and vectors; `model`: another language model than the recipe's.

        Raises ConfigError, CheckpointError or DataError for what is not there, or names no language model.
        """
        sources = [open_sae(Path(sae.path), name=sae.name, hook=sae.hook) for sae in self.saes]
        lm, checkpoint = model, None
        if lm is None and self.model is not None:
            lm, checkpoint = Path(self.model), None if self.checkpoint is None else Path(self.checkpoint)
        if lm is None:
            known = next((source for source in sources if source.lm is not None), None)
            if known is None or known.lm is None:
                names = [source.sae.model for source in sources if source.sae.model]
                hint = f", an SAE says it is {names[0]}" if names else ""
                raise ConfigError(
                    f"it is not known which language model is to be steered{hint}: name its directory (--model, or model "
                    "in a recipe)"
                )
            lm, checkpoint = known.lm, known.checkpoint
        vectors = [read_vector(Path(direction.file), direction.tensor) for direction in self.directions]
        probes = [read_probe(Path(probe.path), hook=probe.hook, kind=probe.kind) for probe in self.probes]
        return OpenRecipe(recipe=self, sources=sources, vectors=vectors, probes=probes, model=lm, checkpoint=checkpoint)

    def functions(self, lm: LanguageModel) -> dict[str, HookFunction]:
        """For everything of `lm` that takes functions by hook point; see `OpenRecipe.functions`."""
        return self.open(model=Path()).functions(lm)


@dataclass(frozen=True, kw_only=True)
class OpenRecipe:
    """A recipe with its weights in memory, ready for any number of strengths and prompts."""

    recipe: Recipe
    sources: list[SAESource]
    """Of `recipe.saes`."""
    vectors: list[torch.Tensor]
    """[M] each, of `recipe.directions`."""
    probes: list[Probe]
    """Of `recipe.probes`."""
    model: Path
    """The language model."""
    checkpoint: Path | None
    """Of it, if it is a run."""

    @property
    def text(self) -> Path | None:
        """A dataset that an SAE brings."""
        return next((source.text for source in self.sources if source.text is not None), None)

    @property
    def spare_special(self) -> bool:
        """Whether special tokens stay as they are."""
        if self.recipe.spare_special is not None:
            return self.recipe.spare_special
        return all(source.spare_special for source in self.sources)

    @property
    def spare_first(self) -> int:
        """First positions that stay as they are."""
        if self.recipe.spare_first is not None:
            return self.recipe.spare_first
        return max((source.spare_first for source in self.sources), default=0)

    def functions(self, lm: LanguageModel, *, strength: float = 1.0) -> dict[str, HookFunction]:
        """For everything of `lm` that takes functions by hook point. Strength 0 gives none.

        Args:
            strength: a further factor of all changes.
        Raises ConfigError if a hook point, a latent or a width is not the model's or the SAE's.
        """
        require(math.isfinite(strength), f"strength must be a finite number, got {strength}")
        strength *= self.recipe.strength
        chains: dict[str, list[HookFunction]] = {}
        spared = {"spare_special": self.spare_special, "spare_first": self.spare_first}
        for sae, source in zip(self.recipe.saes, self.sources):
            edits = [edit.edit() for edit in sae.edits]
            steering = Steering(source.sae, edits, strength=strength, hook=source.hook, **spared)
            for hook, function in steering.functions(lm).items():
                chains.setdefault(hook, []).append(function)
        for hook, change, factor in self._others(lm):
            function = weighted(lm, change, strength * factor, **spared)
            chains.setdefault(hook, []).append(function)
        return {hook: chained(functions) for hook, functions in chains.items()} if strength else {}

    def _others(self, lm: LanguageModel) -> Iterator[tuple[str, HookFunction, float]]:
        """(hook point, the whole change, its strength) of directions and probes."""
        for direction, vector_M in zip(self.recipe.directions, self.vectors):
            _check_width(lm, direction.hook, len(vector_M), direction.file)
            vector_M = vector_M.to(lm.context.device)
            change = add_direction(vector_M) if direction.do == "add" else project_out(vector_M)
            yield direction.hook, change, direction.strength
        for edit, probe in zip(self.recipe.probes, self.probes):
            _check_width(lm, probe.hook, probe.means_CM.shape[1], edit.path)
            change = probe_edit(
                probe, edit.do, target=edit.target, other=edit.other, value=edit.value, where=edit.where
            )
            yield probe.hook, change, edit.strength


def _check_width(lm: LanguageModel, hook: str, width: int, file: str) -> None:
    hook_point(hook, lm.model)
    if width != lm.model.d_model:
        raise ConfigError(f"{file} is of activations of width {width}, {hook} of this model has {lm.model.d_model}")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe, no weights. Raises ConfigError with the file, the key, its value and what was expected."""
    values = load_yaml(path)
    try:
        return from_mapping(Recipe, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_vector(path: Path, name: str | None = None) -> torch.Tensor:
    """A vector float32 [M] of a safetensors file; `name` None: the only one. Raises DataError if it is not there."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if name is None and len(names) == 1:
                (name,) = names
            if name not in names:
                asked = "several tensors: name one of" if name is None else f"no tensor {name!r}, only"
                raise DataError(f"{path} holds {asked} {', '.join(names)}")
            vector_M = file.get_tensor(name).float()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}") from error
    if vector_M.ndim != 1:
        raise DataError(f"{name} in {path} must be a vector, it has shape {list(vector_M.shape)}")
    return vector_M
