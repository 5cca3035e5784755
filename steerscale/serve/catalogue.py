"""What can be asked for: the language model, plain or with one of the recipes it was started with."""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerscale.errors import ConfigError
from steerscale.interp.recipes import SUFFIXES, OpenRecipe, load_recipe
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction
from steerscale.serve.errors import RequestError

_NAME = re.compile(r"[\w.-]{1,100}")
_KEPT = 16
"""Recipes at a strength whose functions are kept."""


def open_recipes(paths: Sequence[Path], model: Path) -> dict[str, OpenRecipe]:
    """Recipes by the names of their files, for this language model.

    Args:
        paths: files, or directories of them.
    Raises:
        ConfigError: a path is not there, a directory holds none, two have one name, or a name is no part of a model's name.
        SteerscaleError: what a recipe names cannot be read.
    """
    found: dict[str, OpenRecipe] = {}
    for path in paths:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"--recipes {path}: the directory holds no {' or '.join(SUFFIXES)} file")
        for file in files:
            if not _NAME.fullmatch(file.stem):
                raise ConfigError(f"{file}: a recipe's name must be of letters, digits and _ . -, like formal.yaml")
            if file.stem in found:
                raise ConfigError(f"{file}: there are two recipes called {file.stem}; rename one")
            found[file.stem] = load_recipe(file).open(model=model)
    return found


class Catalogue:
    """Models by name: `NAME`, and `NAME:RECIPE` for each recipe."""

    def __init__(self, lm: LanguageModel, name: str, recipes: Mapping[str, OpenRecipe] | None = None) -> None:
        """Raises ConfigError if a recipe does not fit the model, or the name is none."""
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"a model's name must be of letters, digits and _ . -, got {name!r}: give one with --name"
            )
        self._lm, self._name, self._recipes = lm, name, dict(recipes or {})
        self._kept: OrderedDict[tuple[str, float], Mapping[str, HookFunction]] = OrderedDict()
        for recipe in self._recipes:
            self.functions(recipe, 1.0)

    @property
    def names(self) -> list[str]:
        """All that may stand in `model`."""
        return [self._name, *(f"{self._name}:{recipe}" for recipe in self._recipes)]

    def recipe_of(self, model: str, recipe: str | None, strength: float | None) -> str | None:
        """The recipe that a request means, None for the plain model. Raises RequestError if there is none like that."""
        name, _, suffix = model.partition(":")
        if name != self._name or (suffix and suffix not in self._recipes) or model.endswith(":"):
            raise RequestError(
                f"the model {model[:100]!r} does not exist; there {'are' if self._recipes else 'is'} "
                f"{', '.join(self.names)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        if recipe is not None and recipe not in self._recipes:
            there = f"there are {', '.join(self._recipes)}" if self._recipes else "the server was started without any"
            raise RequestError(
                f"the recipe {recipe[:100]!r} does not exist; {there}", param="recipe", code="recipe_not_found"
            )
        if recipe is not None and suffix and recipe != suffix:
            raise RequestError(f"the model's name asks for the recipe {suffix}, recipe for {recipe}", param="recipe")
        chosen = recipe or suffix or None
        if strength is not None and chosen is None:
            raise RequestError("strength goes with a recipe", param="strength")
        return chosen

    def functions(self, recipe: str | None, strength: float) -> Mapping[str, HookFunction]:
        """What the recipe does, by hook point. Not for several threads at once."""
        if recipe is None:
            return {}
        key = (recipe, strength)
        if key not in self._kept:
            self._kept[key] = self._recipes[recipe].functions(self._lm, strength=strength)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]
