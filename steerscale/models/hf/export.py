"""Export: a directory that transformers' `AutoModelForCausalLM.from_pretrained` loads."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from steerscale.config import require
from steerscale.errors import CheckpointError, ConfigError, DataError
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT
from steerscale.models.hf.families import family_of
from steerscale.models.hf.recipes import Recipe
from steerscale.models.hf.tensors import INDEX, SINGLE
from steerscale.models.sharding import named_shards
from steerscale.parallel.collect import whole_parameters
from steerscale.parallel.context import ParallelContext
from steerscale.tokenizers.directory import new_directory

MAX_FILE_BYTES = 5 * 10**9

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)


def parameter_names(model: ModelConfig) -> list[str]:
    """Global names of all whole parameters, in the order in which `write_hf` takes them. Raises ConfigError."""
    return list(family_of(model)[1].recipes(model))


def write_hf(
    model: ModelConfig,
    wholes: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_directory: Path | None = None,
    eos_token_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write whole parameters as a Hugging Face directory, which appears complete or not at all. One process does this.

    At most one file's tensors and one parameter more are in memory at once.

    Args:
        wholes: (global name, parameter) in the order of `parameter_names`.
        directory: must not exist.
        dtype: type to write the weights in.
        tokenizer_directory: its tokenizer files (and generation_config.json) are copied.
        eos_token_id: token at which generation ends; None leaves that to generation_config.json.
        max_file_bytes: begin a new file before one grows past this.
    Raises:
        ConfigError: no architecture expresses the model, it has no token `eos_token_id`, or the tokenizer directory holds no
            tokenizer.
        DataError: `directory` exists, or cannot be written.
    """
    model_type, family = family_of(model)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise DataError(f"{directory} exists already: choose another output directory")
    require(
        eos_token_id is None or 0 <= eos_token_id < model.tokens,
        f"eos_token_id must be one of the model's tokens, 0 to {model.tokens - 1}, got {eos_token_id}",
    )
    recipes = family.recipes(model)
    # Defaults of transformers for special tokens are those of the first models; better none than wrong ones.
    special = {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": None}
    config = {"architectures": [family.architecture], "model_type": model_type, **family.write_config(model), **special}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    tokenizer = _tokenizer_files(tokenizer_directory)
    with new_directory(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in tokenizer:
            shutil.copyfile(path, temporary / path.name)
        _write_tensors(recipes, iter(wholes), temporary, dtype=dtype, max_file_bytes=max_file_bytes)


def export_hf(
    chunks: Sequence[GPT],
    context: ParallelContext,
    directory: Path,
    *,
    tokenizer_directory: Path | None = None,
    eos_token_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model that all ranks hold together as a Hugging Face directory; every rank calls this.

    Rank 0 writes, in the type of the parameters; see `write_hf` for arguments and errors. Errors are raised on every rank:
    those of writing as themselves on rank 0, as CheckpointError on the others.
    """
    model = chunks[0].model
    wholes = whole_parameters(list(named_shards(chunks)), context, parameter_names(model))
    problem: Exception | None = None
    if context.rank == 0:
        try:
            write_hf(
                model,
                wholes,  # type: ignore[arg-type]  # never None on this rank
                directory,
                dtype=next(chunks[0].parameters()).dtype,
                tokenizer_directory=tokenizer_directory,
                eos_token_id=eos_token_id,
                max_file_bytes=max_file_bytes,
            )
        except Exception as error:  # noqa: BLE001 - the other ranks wait for rank 0's part in the gathering
            problem = error
    for _ in wholes:
        pass  # the part of all other ranks, and on rank 0 of what an error left
    told = [None if problem is None else f"{directory} was not written: {problem}"]
    dist.broadcast_object_list(told, src=0)
    if problem is not None:
        raise problem
    if told[0] is not None:
        raise CheckpointError(told[0])


def _tokenizer_files(directory: Path | None) -> list[Path]:
    if directory is None:
        return []
    paths = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in paths):
        raise ConfigError(
            f"{directory} holds no Hugging Face tokenizer: no tokenizer.json, tokenizer.model or vocab.json"
        )
    return paths


def _write_tensors(
    recipes: dict[str, Recipe],
    wholes: Iterator[tuple[str, torch.Tensor]],
    directory: Path,
    *,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> None:
    groups = _group(recipes, dtype.itemsize, max_file_bytes)
    where: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for expected in names:
            name, whole = next(wholes)
            assert name == expected, (name, expected)
            tensors |= _file_tensors(recipes[name], whole.to(dtype))
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error  # a full disk, which has no error of its own there
        shutil.copymode(directory / "config.json", directory / file)  # safetensors makes files private
        where |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _file_tensors(recipe: Recipe, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The file tensors that a whole parameter makes up: copies, padding dropped."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for piece, rows in zip(recipe.pieces, whole.split([piece.rows for piece in recipe.pieces])):
        if piece.source is not None:
            parts.setdefault(piece.source, {})[piece.start] = rows
    tensors = {source: torch.cat([rows[start] for start in sorted(rows)]) for source, rows in parts.items()}
    return {source: tensor.T.contiguous() for source, tensor in tensors.items()} if recipe.transposed else tensors


def _group(recipes: dict[str, Recipe], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Parameters by file, in order; a file is closed before the parameter that would make it too large."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, recipe in recipes.items():
        extra = prod(recipe.shape) * itemsize
        if groups[-1] and size + extra > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += extra
    return groups
