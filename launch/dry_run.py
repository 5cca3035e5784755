"""`launcher=dry_run`: any rank of any layout, built in this process on the meta device, against the planner's arithmetic."""

from steerscale.models.gpt import GPT, transformer_config
from steerscale.parallel.context import initialize
from steerscale.planning.flops import model_flops_per_token
from steerscale.planning.memory import MemoryEstimate, estimate_memory, shard_parameters, unique_parameters
from steerscale.train.config import RunConfig


def show_plan(config: RunConfig) -> str:
    """The plan as text: what the whole model costs and what the chosen ranks hold."""
    layout, model = config.layout(), config.model
    held = sum(
        shard_parameters(model, layout, layout.tensor * layout.data * stage + tensor)
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    )
    lines = [
        f"layout      {layout} = {layout.world_size:,} ranks",
        f"batch       {layout.global_batch_size:,} sequences x {model.seq_len:,} tokens = "
        f"{layout.global_batch_size * model.seq_len:,} tokens a step, {config.train.steps:,} steps = "
        f"{layout.global_batch_size * model.seq_len * config.train.steps / 1e9:,.3f}B tokens",
        f"parameters  {unique_parameters(model, layout):,} in the model, {held:,} held by a replica's "
        f"{layout.tensor * layout.pipeline} ranks, {held * layout.data:,} over all ranks",
        f"compute     {model_flops_per_token(model):.4g} model FLOPs a token",
        f"pipeline    {layout.gradient_accumulation_steps} micro-batches a step, bubble {layout.bubble_fraction:.1%}",
        "",
        _row("rank", "stage data tensor", "layers", "parameters", *PARTS, "total GiB"),
    ]
    lines += [_describe(config, rank) for rank in config.launcher.ranks]
    lines.append("")
    lines.append("memory is an estimate in GiB, without the allocator's fragmentation and the communication buffers")
    return "\n".join(lines)


PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def _describe(config: RunConfig, rank: int) -> str:
    """Build this rank's chunks for real, without memory, and hold them against the planner."""
    layout, model = config.layout(), config.model
    with initialize(layout, backend="fake", rank=rank, device="meta") as context:
        transformer = transformer_config(
            model, context, precision=config.engine.precision, recompute=config.engine.recompute
        )
        chunks = [GPT(model, transformer, context, chunk=index) for index in range(layout.virtual_pipeline)]
        built = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        layers = ",".join(
            f"{chunk.first_layer}-{chunk.first_layer + len(chunk.decoder.layers) - 1}" for chunk in chunks
        )
        at = context.at
    planned = shard_parameters(model, layout, rank)
    assert built == planned, f"rank {rank} holds {built} parameters, the planner says {planned}"
    memory: MemoryEstimate = estimate_memory(
        model,
        layout,
        precision=config.engine.precision,
        distributed_optimizer=config.engine.distributed_optimizer,
        recompute=config.engine.recompute,
        stage=at.pipeline,
    )
    parts = [f"{getattr(memory, part) / 2**30:.2f}" for part in PARTS]
    return _row(rank, f"{at.pipeline} {at.data} {at.tensor}", layers, f"{built:,}", *parts, f"{memory.total_gib:.2f}")


def _row(rank: object, at: str, layers: str, parameters: str, *numbers: str) -> str:
    return f"{rank!s:>6}  {at:<17}  {layers:<12}  {parameters:>15}" + "".join(f"  {number:>11}" for number in numbers)
