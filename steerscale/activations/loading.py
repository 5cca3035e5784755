"""The language model that `stream:` names, loaded as an activation source."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerscale.activations.config import StreamConfig
from steerscale.activations.shape import find_kind, hf_precision, hf_settings
from steerscale.activations.source import ActivationSource, GPTSource, TransformersSource, check_source_layout
from steerscale.data.dataset import SampleStream
from steerscale.errors import ConfigError, DataError
from steerscale.load import load_gpt
from steerscale.models.gpt import build_chunks, transformer_config
from steerscale.models.hf.families import config_from_hf
from steerscale.models.hf.load import load_hf
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import tensor_parallel
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.registry import load_tokenizer

logger = logging.getLogger(__name__)

_SAMPLED_BYTES = 2**20


def load_source(config: StreamConfig, hooks: Sequence[str], context: ParallelContext) -> ActivationSource:
    """Load the model, each rank its own part, frozen. The layout is the context's.

    Raises:
        ConfigError: `stream.lm` is no model, cannot be what `stream.lm_kind` says, or lacks a hook point.
        LayoutError: the model cannot be cut so, or the layout interleaves.
        CheckpointError: no whole checkpoint, or weights that do not fit.
    """
    check_source_layout(context)
    kind = find_kind(config)
    if kind == "transformers":
        source: ActivationSource = _load_transformers(config, hooks, context)
    else:
        # Sequence parallelism asks for Megatron-Core's generators even where nothing is dropped.
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        source = (_load_run if kind == "run" else _load_family)(config, hooks, context)
    return source


def _load_run(config: StreamConfig, hooks: Sequence[str], context: ParallelContext) -> ActivationSource:
    checkpoint = None if config.checkpoint is None else Path(config.checkpoint)
    precision = None if config.precision == "auto" else config.precision
    trained = load_gpt(Path(config.lm), context, checkpoint=checkpoint, precision=precision)
    chunks = trained.chunks
    _freeze(chunks)
    return GPTSource(
        chunks,
        hooks,
        context,
        seq_len=config.seq_len or trained.config.model.seq_len,
        special_ids=special_tokens(trained.tokenizer),
        tokenizer_hash=trained.tokenizer.hash,
        identity=_identity(trained.checkpoint, chunks[0].config.params_dtype),
    )


def _load_family(config: StreamConfig, hooks: Sequence[str], context: ParallelContext) -> ActivationSource:
    directory = Path(config.lm)
    model = config_from_hf(directory)
    seq_len = config.seq_len or model.seq_len
    if model.position == "rotary":
        model = replace(model, seq_len=seq_len)  # rotary positions go on for ever
    context.layout.check_model(model)
    chunks = build_chunks(model, transformer_config(model, context, precision=hf_precision(config)), context)
    load_hf(directory, chunks, context)
    _freeze(chunks)
    tokenizer = _hf_tokenizer(directory)
    return GPTSource(
        chunks,
        hooks,
        context,
        seq_len=seq_len,
        special_ids=special_tokens(tokenizer),
        tokenizer_hash=tokenizer and tokenizer.hash,
        identity=_identity(directory, chunks[0].config.params_dtype),
    )


def _load_transformers(config: StreamConfig, hooks: Sequence[str], context: ParallelContext) -> ActivationSource:
    import transformers  # slow, and the other kinds need none of it

    directory = Path(config.lm)
    settings = hf_settings(directory)
    # The class that wrote it, head included, if it is one that transformers has; module paths are the ones of that class.
    (name, *_) = [*(settings.get("architectures") or []), ""]
    model_class: Any = getattr(transformers, name, transformers.AutoModel) if name else transformers.AutoModel
    dtype = torch.bfloat16 if hf_precision(config) == "bf16" else torch.float32
    try:
        model = model_class.from_pretrained(directory, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"stream.lm={config.lm} cannot be loaded by transformers: {error}") from error
    seq_len = config.seq_len or getattr(model.config, "max_position_embeddings", None)
    if seq_len is None:
        raise ConfigError(
            f"stream.seq_len must be given: the config.json of {config.lm} does not say how long sequences may be"
        )
    if model.get_output_embeddings() is None:
        logger.warning(
            "%s was written by %s, which has no output head: what an SAE costs the model's loss (ce_*) will not be known",
            *(config.lm, type(model).__name__),
        )
    tokenizer = _hf_tokenizer(directory)
    model = model.to(context.device)
    _freeze([model])
    return TransformersSource(
        model,
        hooks,
        context,
        seq_len=seq_len,
        special_ids=special_tokens(tokenizer),
        tokenizer_hash=tokenizer and tokenizer.hash,
        identity=_identity(directory, dtype),
    )


def special_tokens(tokenizer: Tokenizer | None) -> set[int]:
    """Begin, end, padding and unknown ids, as far as the tokenizer has them, by the names the usual ones go by."""
    if tokenizer is None:
        return set()
    unknown = [tokenizer.id_of(piece) for piece in ("<unk>", "[UNK]", "<|endoftext|>")]
    return {token for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *unknown) if token is not None}


def check_tokenizer(source: ActivationSource, dataset: SampleStream) -> None:
    """Raise DataError unless the dataset's token ids are the model's."""
    if source.tokenizer_hash is not None and source.tokenizer_hash != dataset.tokenizer_hash:
        raise DataError(
            f"the dataset was made with another tokenizer (hash {dataset.tokenizer_hash[:12]}) than the language model's "
            f"({source.tokenizer_hash[:12]}): prepare the text with the tokenizer of stream.lm"
        )
    if dataset.vocab_size > source.vocab_size:
        raise DataError(
            f"the dataset has token ids up to {dataset.vocab_size - 1}, the language model knows {source.vocab_size} tokens: "
            "prepare the text with the tokenizer of stream.lm"
        )


def _freeze(modules: Sequence[torch.nn.Module]) -> None:
    for module in modules:
        module.eval()
        module.requires_grad_(False)


def _identity(directory: Path, dtype: torch.dtype) -> str:
    """A name for these weights that stays when the directory moves: of its files the sizes, beginnings and ends."""
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=8)
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(size - _SAMPLED_BYTES, 0))
                digest.update(file.read())
    return f"{directory.name}-{digest.hexdigest()}"


def _hf_tokenizer(directory: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(directory)
    except DataError:
        return None  # weights without a tokenizer: the dataset's own is all that is known
