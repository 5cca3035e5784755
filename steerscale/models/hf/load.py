"""Import: each rank reads the slices of the files that it holds itself, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import torch

from steerscale.errors import CheckpointError, ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.families import read_config
from steerscale.models.hf.recipes import Family, Recipe
from steerscale.models.hf.tensors import TensorFiles, open_tensors
from steerscale.models.sharding import Chunk, named_shards
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Box


@torch.no_grad()
def load_hf(directory: Path, chunks: Sequence[Chunk], context: ParallelContext) -> None:
    """Fill this rank's model chunks with the weights in a Hugging Face directory. No communication.

    The optimizer copies weights when it is built: load before that. `seq_len` may be shorter than the file's learned
    positions (the first are taken); with rotary positions it is free. Padding rows of the vocabulary become zero.

    Raises:
        ConfigError: config.json is of another model, or not understood.
        CheckpointError: tensors are missing, unexpected, of the wrong shape, or not in safetensors.
    """
    family, theirs = read_config(directory)
    model = chunks[0].model
    _check_same(model, theirs, directory)
    recipes = family.recipes(model)
    with open_tensors(directory) as files:
        recipes = _match_names(family, recipes, files)
        for shard, parameter in named_shards(chunks):
            recipe = recipes[shard.name]
            whole_shape = shard.whole_shape(parameter.shape, size=context.layout.tensor)
            assert whole_shape == recipe.shape, (shard.name, whole_shape, recipe.shape)
            _check_shapes(recipe, files)
            flat = parameter.view(-1)
            for box in shard.boxes(parameter.shape, rank=context.at.tensor, size=context.layout.tensor):
                _fill(flat[box.start : box.stop].view(box.shape), box, recipe, files)


def _check_same(ours: ModelConfig, theirs: ModelConfig, directory: Path) -> None:
    names = ["num_layers", "d_model", "num_heads", "kv_groups", "head_width", "ffn_width", "tokens", "position", "norm"]
    names += ["norm_eps", "activation", "bias", "has_qkv_bias", "tie_embeddings"]
    names += ["rope_theta"] if theirs.position == "rotary" else []
    for name in names:
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if wanted != found:
            raise ConfigError(
                f"the model in {directory} is another one: its {name} is {found}, the configured {wanted}"
            )


def _match_names(family: Family, recipes: dict[str, Recipe], files: TensorFiles) -> dict[str, Recipe]:
    """The recipes with the names that the files use, once nothing is missing or left over."""
    if not any(name.startswith(family.prefix) for name in files.names):
        recipes = {name: recipe.renamed(lambda s: s.removeprefix(family.prefix)) for name, recipe in recipes.items()}
    expected = {source for recipe in recipes.values() for source in recipe.source_rows()}
    if missing := sorted(expected - files.names):
        raise CheckpointError(f"{files.directory} lacks {len(missing)} tensors, such as {missing[0]}")
    unexpected = sorted(name for name in files.names - expected if not family.ignored.fullmatch(name))
    if unexpected:
        raise CheckpointError(
            f"{files.directory} holds {len(unexpected)} tensors that its config.json does not account for, such as "
            f"{unexpected[0]}"
        )
    return recipes


def _check_shapes(recipe: Recipe, files: TensorFiles) -> None:
    for source, rows in recipe.source_rows().items():
        expected = (rows,) if recipe.columns is None else (rows, recipe.columns)
        if recipe.transposed:
            expected = expected[::-1]
        found = files.shape(source)
        fits = found[0] >= expected[0] and found[1:] == expected[1:] if recipe.longer else found == expected
        if not fits:
            least = " or more rows" if recipe.longer else ""
            raise CheckpointError(f"{files.directory}: {source} has shape {found}, expected {expected}{least}")


def _fill(target: torch.Tensor, box: Box, recipe: Recipe, files: TensorFiles) -> None:
    """Read the rows and columns of `box` into `target`, which has its shape."""
    first, last = box.offset[0], box.offset[0] + box.shape[0]
    columns = [slice(start, start + extent) for start, extent in zip(box.offset[1:], box.shape[1:])]
    end = 0
    for piece in recipe.pieces:
        begin, end = end, end + piece.rows
        low, high = max(first, begin), min(last, end)
        if low >= high:
            continue
        part = target[low - first : high - first]
        if piece.source is None:
            part.zero_()
            continue
        rows = slice(piece.start + low - begin, piece.start + high - begin)
        if recipe.transposed:
            part.copy_(files.read(piece.source, *columns, rows).T)
        else:
            part.copy_(files.read(piece.source, rows, *columns))
