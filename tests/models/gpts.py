"""Small GPTs for tests that run on ranks, and one forward pass through whatever pipeline they are cut into."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.sharding import initialize_parameters, named_shards
from steerscale.optim import OptimConfig
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import get_forward_backward_func, tensor_parallel

GPT2 = ModelConfig(
    num_layers=4,
    d_model=24,
    num_heads=4,
    seq_len=16,
    vocab_size=61,
    activation="gelu_tanh",
    pad_vocab_to=16,
    init_std=0.1,
)
LLAMA = replace(
    GPT2,
    num_kv_groups=2,
    d_head=8,
    d_ff=40,
    position="rotary",
    rope_theta=500.0,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
TIED_LLAMA = replace(LLAMA, tie_embeddings=True)
MODELS = {"gpt2": GPT2, "llama": LLAMA, "tied_llama": TIED_LLAMA}


def build(model: ModelConfig, context: ParallelContext) -> list[GPT]:
    """This rank's chunks, uninitialised. Raises LayoutError if the model cannot be cut so."""
    context.layout.check_model(model)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # sequence parallelism asks for it even where nothing is dropped
    config = transformer_config(model, context)
    return [GPT(model, config, context, chunk=chunk) for chunk in range(context.layout.virtual_pipeline)]


def build_random(model: ModelConfig, context: ParallelContext) -> list[GPT]:
    """This rank's chunks, every parameter random: norms and biases as well, so that none can hide."""
    chunks = build(model, context)
    initialize_parameters(chunks, context, seed=1)
    with torch.no_grad():
        for shard, parameter in named_shards(chunks):
            if parameter.ndim == 1:
                shape = shard.whole_shape(parameter.shape, size=context.layout.tensor)
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shard.name.encode())))
                parameter += 0.2 * shard.take(noise, rank=context.at.tensor, size=context.layout.tensor)
    return chunks


def build_engine(model: ModelConfig, context: ParallelContext) -> MegatronEngine:
    """An engine around `build_random`."""
    chunks = build_random(model, context)
    return MegatronEngine(
        chunks,
        shards=list(named_shards(chunks)),
        config=chunks[0].config,
        engine=EngineConfig(),
        optim=OptimConfig(lr=1e-3),
        context=context,
    )


def whole_logits(logits_SBV_local: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """[B, S, V] without padding columns, on every tensor rank."""
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits_SBV_local)
    return whole[..., : model.tokens].transpose(0, 1)


@torch.no_grad()
def infer(chunks: Sequence[GPT], tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """Whole logits [B, S, V] on the last stage, None on others; no engine, so no optimizer state."""
    for chunk in chunks:
        chunk.eval()
    # The interleaved schedule wants as many micro-batches as there are stages: copies.
    copies = [tokens_BS] * (chunks[0].pg_collection.pp.size() if len(chunks) > 1 else 1)
    iterators = [iter(copies) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: (chunk(next(batches)), None),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(copies),
        seq_length=tokens_BS.shape[1],
        micro_batch_size=tokens_BS.shape[0],
        forward_only=True,
    )
    return whole_logits(outputs[0], chunks[0].model) if outputs else None
