"""What the ranks of an SAE run hold, those that train and those of the language model: for dry runs, and before a launch."""

from dataclasses import dataclass

from launch.check import data_is_there
from steerscale.activations.cost import DTYPE_BYTES
from steerscale.activations.order import HALVES, block_sequences
from steerscale.activations.shape import find_kind, model_precision
from steerscale.data.dataset import inspect_data
from steerscale.errors import ConfigError
from steerscale.models.hook_points import hook_point
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.fit import usable_gib
from steerscale.planning.machine import Machine
from steerscale.planning.memory import GIB
from steerscale.planning.sae_memory import SAEShape, frozen_model_bytes, sae_bytes
from steerscale.sae.config import specs_of
from steerscale.train.config import RunConfig, total_samples

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class RankKind:
    """Ranks that do the same."""

    name: str
    key: str
    """The section of the configuration that sets their layout."""
    layout: ParallelLayout
    parts: dict[str, int]
    """Bytes of the fullest of them."""

    @property
    def total_gib(self) -> float:
        """Of the fullest."""
        return sum(self.parts.values()) / GIB

    def spoken_parts(self) -> str:
        """The parts, the largest first."""
        ordered = sorted(self.parts.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {_size(size)}" for name, size in ordered)


def kinds_of_ranks(config: RunConfig) -> list[RankKind]:
    """Ranks that train, and the language model's own where it has any; else those that do both."""
    layout, placement = config.layout(), config.placement()
    if placement is None:
        stages = [{**_model(config, layout, stage), **_training(config, stage)} for stage in range(layout.pipeline)]
        return [RankKind(name="ranks", key="parallel", layout=layout, parts=_fullest(stages))]
    producers = placement.producers
    passes = _fullest([_model(config, producers, stage) for stage in range(producers.pipeline)])
    return [
        RankKind(name="trainers", key="parallel", layout=layout, parts=_training(config, 0)),
        RankKind(name="producers", key="stream.producers", layout=producers, parts=passes),
    ]


def refuse_oversized_saes(config: RunConfig, machine: Machine) -> None:
    """Raise ConfigError if the fullest rank of a kind cannot fit the GPUs."""
    for kind in kinds_of_ranks(config):
        if kind.total_gib > usable_gib(machine.memory_gib):
            raise ConfigError(
                f"the {kind.name} ({kind.layout}) need about {kind.total_gib:,.1f} GiB each ({kind.spoken_parts()}), and "
                f"{machine.name} has {machine.memory_gib:g} GiB: raise {kind.key}.tensor"
                f"{'' if kind.name == 'trainers' else f' or {kind.key}.pipeline'}; launcher.force=true starts it all the same"
            )


def show_sae_plan(config: RunConfig) -> str:
    """The plan of an SAE run as text."""
    lines = [f"plan of {config.name!r}; nothing is started or written", ""]
    lines += [f"{title:<12}{text}" for title, text in [*_facts(config), *_memory(config)]]
    return "\n".join(
        [*lines, "", "Memory is estimated, without the CUDA context, NCCL's buffers and the allocator's fragmentation."]
    )


def _facts(config: RunConfig) -> list[tuple[str, str]]:
    sae, stream, model, layout = config.sae, config.stream, config.model, config.layout()
    assert sae is not None
    assert stream is not None
    specs = specs_of(sae, dict.fromkeys(sae.all_hooks, model.d_model))
    vectors = total_samples(config.train.ramp_up, layout, config.train.steps)
    facts = [
        (
            "model",
            f"{stream.lm}: {model.num_layers} layers of width {model.d_model:,}, frozen, {model_precision(stream)}",
        ),
        *(("SAE", f"{s.name}: {s.config.architecture} {s.d_in:,} -> {s.width:,}") for s in specs),
        *((kind.name, _degrees(kind.layout)) for kind in kinds_of_ranks(config)),
        ("batch", f"{layout.global_batch_size:,} vectors a step"),
        ("run", f"{config.train.steps:,} steps = {vectors:,} vectors"),
    ]
    if data_is_there(config) and config.data is not None:
        tokens = sum(m.splits["train"].tokens for m in inspect_data(config.data, seq_len=model.seq_len).values())
        facts.append(("data", f"{tokens:,} tokens, read about {vectors / tokens:,.3g} times over"))
    return facts


def _memory(config: RunConfig) -> list[tuple[str, str]]:
    return [
        ("buffer", f"{_size(_buffer_bytes(config))} over all ranks that train"),
        *(
            ("memory", f"{kind.name}: about {_size(sum(kind.parts.values()))} on the fullest ({kind.spoken_parts()})")
            for kind in kinds_of_ranks(config)
        ),
    ]


def _degrees(layout: ParallelLayout) -> str:
    sequence = ", sequence parallel" if layout.sequence else ""
    return f"{layout.world_size:,} = {layout.tensor} tensor x {layout.pipeline} pipeline x {layout.data} data{sequence}"


def _model(config: RunConfig, layout: ParallelLayout, stage: int) -> dict[str, int]:
    assert config.stream is not None
    stream = config.stream
    if find_kind(stream) == "transformers":
        layout = ParallelLayout()  # whole on every rank
    precision, sequences = model_precision(stream), stream.micro_batch_size
    return frozen_model_bytes(config.model, layout, precision=precision, sequences=sequences, stage=stage)


def _training(config: RunConfig, stage: int) -> dict[str, int]:
    """Of the SAEs on a stage; all of them where the model is elsewhere."""
    sae, model, layout = config.sae, config.model, config.layout()
    assert sae is not None
    specs = specs_of(sae, dict.fromkeys(sae.all_hooks, model.d_model))
    if layout.pipeline > 1:
        place = {hook: hook_point(hook, model).layer * layout.pipeline // model.num_layers for hook in sae.all_hooks}
        specs = [spec for spec in specs if place[spec.inputs[0]] == stage]
    here = {hook for spec in specs for hook in (*spec.inputs, *spec.outputs)}
    return sae_bytes(
        [SAEShape(d_in=spec.d_in, d_out=spec.d_out, width=spec.width) for spec in specs],
        layout,
        engine=config.engine,
        averaged=sae.ema > 0,
        buffer_bytes=_buffer_bytes(config) * len(here) // len(sae.all_hooks),
    )


def _buffer_bytes(config: RunConfig) -> int:
    """What the buffer really takes: whole sequences of all lanes in both halves."""
    sae, stream, model = config.sae, config.stream, config.model
    assert sae is not None
    assert stream is not None
    dtype = model_precision(stream) if stream.buffer_dtype == "auto" else stream.buffer_dtype
    per_vector = len(sae.all_hooks) * model.d_model * DTYPE_BYTES[dtype]
    sequences = block_sequences(stream, seq_len=model.seq_len, bytes_per_vector=per_vector)
    return HALVES * stream.lanes * sequences * (model.seq_len - stream.drop_first) * per_vector


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.2f} MiB"


def _fullest(stages: list[dict[str, int]]) -> dict[str, int]:
    return max(stages, key=lambda parts: sum(parts.values()))
