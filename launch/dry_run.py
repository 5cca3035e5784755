"""`launcher=dry_run`: the plan of a run in words, and any rank of any layout built in this process on the meta device.

What the planner computes is held against what Megatron-Core builds: a difference is a defect and ends the dry run.
"""

from pathlib import Path

from launch.check import data_is_there
from steerscale.data.dataset import inspect_data
from steerscale.data.order import ShuffledWindows
from steerscale.models.gpt import build_chunks, transformer_config
from steerscale.optim import learning_rate
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.fit import usable_gib
from steerscale.planning.flops import model_flops_per_token
from steerscale.planning.hardware import DEVICES
from steerscale.planning.memory import PARTS, MemoryEstimate, estimate_memory, shard_parameters, unique_parameters
from steerscale.train.config import RunConfig, total_samples, wsd_decay_steps

UNITS = {"MiB": 2**20, "GiB": 2**30}


def show_plan(config: RunConfig) -> str:
    """The plan as text: what the whole model costs and what the chosen ranks hold."""
    unit = _unit(config)
    lines = [
        f"plan of {config.name!r}; nothing is started or written",
        "",
        *(f"{title:<12}{text}" for title, text in plan_lines(config)),
        "",
        _row("rank", "stage", "replica", "tensor", "layers", "parameters", *PARTS, "total"),
        *(_describe(config, rank, unit) for rank in config.launcher.ranks),
        "",
        "The shards were built, without memory, and hold exactly these parameters. Weights to total: estimated "
        f"{unit} at the",
        "fullest moment, without the CUDA context, NCCL's buffers and the allocator's fragmentation.",
    ]
    return "\n".join(lines)


def plan_lines(config: RunConfig) -> list[tuple[str, str]]:
    """(title, text) of each fact about the whole run."""
    layout, model = config.layout(), config.model
    heads = f"{model.num_heads} heads" + (
        f" on {model.kv_groups} key/value" if model.kv_groups != model.num_heads else ""
    )
    total, held = unique_parameters(model, layout), replica_parameters(config)
    tokens = total_samples(config.train.ramp_up, layout, config.train.steps) * model.seq_len
    flops = model_flops_per_token(model)
    return [
        (
            "model",
            f"{total:,} parameters: {model.num_layers} layers of width {model.d_model:,}, {heads}, vocabulary of "
            f"{model.tokens:,} tokens (padded to {model.padded_vocab:,})",
        ),
        (
            "ranks",
            f"{layout.world_size:,} = {layout.tensor} tensor x {layout.pipeline} pipeline x {layout.data} data"
            f"{', sequence parallel' if layout.sequence else ''}; {layout}",
        ),
        ("engine", f"{config.engine.title} in {config.engine.precision}, recompute {config.engine.recompute}"),
        (
            "copies",
            f"{_count(held, 'parameter')} in each replica of {_count(layout.tensor * layout.pipeline, 'rank')}, "
            f"{_repeated(held, total)}; {held * layout.data:,} over all ranks",
        ),
        (
            "batch",
            f"{layout.micro_batch_size} a micro-batch x {layout.gradient_accumulation_steps} accumulated x "
            f"{_count(layout.data, 'replica')} = {_count(layout.global_batch_size, 'sequence')} of {model.seq_len:,} = "
            f"{layout.global_batch_size * model.seq_len:,} tokens a step{_ramp(config)}",
        ),
        (
            "run",
            f"{config.train.steps:,} steps = {tokens:,} tokens ({tokens / total:.3g} a parameter), {flops * tokens:.4g} model "
            f"FLOPs ({flops:.4g} a token)",
        ),
        *_data_lines(config),
        ("learning", _schedule(config)),
        ("pipeline", _pipeline(layout)),
        ("memory", _memory(config)),
    ]


def replica_parameters(config: RunConfig) -> int:
    """Parameters that the ranks of one replica hold together, what several of them hold counted as often."""
    layout = config.layout()
    # All tensor ranks of a stage hold equally many.
    first = (layout.tensor * layout.data * stage for stage in range(layout.pipeline))
    return layout.tensor * sum(shard_parameters(config.model, layout, rank) for rank in first)


def _repeated(held: int, total: int) -> str:
    if held == total:
        return "each held once"
    return f"{held - total:,} of them copies (norms, positions, the last stage's tied embedding)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ramp(config: RunConfig) -> str:
    ramp_up = config.train.ramp_up
    if ramp_up is None:
        return ""
    return f", from {ramp_up.start:,} sequences in steps of {ramp_up.increment:,} over the first {ramp_up.samples:,}"


def _data_lines(config: RunConfig) -> list[tuple[str, str]]:
    """One line a dataset: how much of it there is, and how often the run reads it."""
    if config.data is None:
        return [("data", "none given; model.vocab_size stands in for the dataset's")]
    if not data_is_there(config):
        absent = ", ".join(path for path in config.data.weights if not Path(path).is_dir())
        return [("data", f"not on this machine, so not checked: {absent}")]
    seq_len = config.model.seq_len
    samples = total_samples(config.train.ramp_up, config.layout(), config.train.steps)
    lines = []
    for path, manifest in inspect_data(config.data, seq_len=seq_len).items():
        tokens, share = manifest.splits["train"].tokens, config.data.weights[path]
        per_epoch = ShuffledWindows(num_tokens=tokens, seq_len=seq_len, key="").per_epoch
        part = f"{share:.1%} of the samples, " if len(config.data.weights) > 1 else ""
        valid = f", {manifest.splits['valid'].tokens:,} held out" if "valid" in manifest.splits else ", none held out"
        lines.append(
            ("data", f"{path}: {part}{tokens:,} tokens{valid}; read {samples * share / per_epoch:,.3g} times over")
        )
    return lines


def _schedule(config: RunConfig) -> str:
    optim, steps = config.optim, config.train.steps
    warmup = f"{optim.warmup_steps:,} steps of warm-up to " if optim.warmup_steps else ""
    last = learning_rate(optim, steps - 1, steps)
    if optim.schedule == "constant":
        return f"{warmup}{optim.lr:g}, constant"
    if optim.schedule == "wsd":
        return f"{warmup}{optim.lr:g}, linear over the last {wsd_decay_steps(optim, steps):,} steps to {last:g}"
    return f"{warmup}{optim.lr:g}, cosine to {last:g} at the last step"


def _pipeline(layout: ParallelLayout) -> str:
    if layout.pipeline == 1:
        return "one stage, no bubble"
    bubble = layout.bubble_fraction
    chunks = f" of {layout.virtual_pipeline} chunks each" if layout.virtual_pipeline > 1 else ""
    text = (
        f"{layout.pipeline} stages{chunks}, {layout.gradient_accumulation_steps} micro-batches a step: bubble {bubble:.1%} of "
        f"the ideal time, so stages are idle {bubble / (1 + bubble):.1%} of each step"
    )
    return f"{text}; accumulate more micro-batches, or interleave" if bubble > 0.25 else text


def _memory(config: RunConfig) -> str:
    stage, estimate = _fullest(config)
    sizes = sorted({device.memory_gib for device in DEVICES.values()})
    fitting = [f"{size:g}" for size in sizes if estimate.total_gib <= usable_gib(size)]
    verdict = (
        f"fits devices of {', '.join(fitting)} GiB" if fitting else f"too much for any device up to {sizes[-1]:g} GiB"
    )
    unit = _unit(config)
    host = f"; {estimate.host / UNITS[unit]:,.2f} {unit} of the host's memory a rank" if estimate.host else ""
    return f"{estimate.total / UNITS[unit]:,.2f} {unit} a rank on the fullest stage ({stage}); {verdict}, with a margin{host}"


def _unit(config: RunConfig) -> str:
    return "GiB" if _fullest(config)[1].total >= UNITS["GiB"] else "MiB"


def _fullest(config: RunConfig) -> tuple[int, MemoryEstimate]:
    stages = [_estimate(config, stage) for stage in range(config.layout().pipeline)]
    return max(enumerate(stages), key=lambda item: item[1].total)


def _estimate(config: RunConfig, stage: int) -> MemoryEstimate:
    return estimate_memory(config.model, config.layout(), engine=config.engine, stage=stage)


def _describe(config: RunConfig, rank: int, unit: str) -> str:
    """Build this rank's chunks for real, without memory, and hold them against the planner."""
    layout, model = config.layout(), config.model
    with initialize(layout, backend="fake", rank=rank, device="meta") as context:
        transformer = transformer_config(
            model, context, precision=config.engine.precision, recompute=config.engine.recompute
        )
        chunks = build_chunks(model, transformer, context)
        built = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        layers = ",".join(
            f"{chunk.first_layer}-{chunk.first_layer + len(chunk.decoder.layers) - 1}" for chunk in chunks
        )
        at = context.at
    planned = shard_parameters(model, layout, rank)
    assert built == planned, f"rank {rank} holds {built} parameters, the planner says {planned}"
    memory = _estimate(config, at.pipeline)
    parts = [f"{getattr(memory, part) / UNITS[unit]:,.2f}" for part in (*PARTS, "total")]
    return _row(rank, at.pipeline, at.data, at.tensor, layers, f"{built:,}", *parts)


def _row(rank: object, stage: object, replica: object, tensor: object, layers: str, *numbers: str) -> str:
    places = f"{rank!s:>6}  {stage!s:>5}  {replica!s:>7}  {tensor!s:>6}  {layers:<14}"
    parameters, *gib = numbers
    return f"{places}  {parameters:>15}" + "".join(f"  {number:>11}" for number in gib)
