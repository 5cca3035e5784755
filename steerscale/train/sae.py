"""Training SAEs on activations streamed from a frozen language model, behind the loop's `Task`.

The language model runs on the whole layout, or on ranks of its own (`activations.remote`). An SAE lives on the pipeline stage
that owns its hook points: there its latents are cut over the tensor group and its optimizer's state over the replicas, by an
engine of its own; other stages only hear of its figures. A *sample* is one activation vector, so `parallel.*_batch_size` count
vectors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist

from steerscale.activations.cost import stream_cost
from steerscale.activations.source import ActivationSource
from steerscale.activations.stream import ActivationStream, build_stream
from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.engines.base import Engine, StepResult, Timer, Totals
from steerscale.engines.deepspeed import DeepSpeedEngine
from steerscale.engines.megatron import MegatronEngine
from steerscale.errors import ConfigError
from steerscale.interp.sae_eval import evaluate_saes, held_out
from steerscale.parallel.context import ParallelContext, stage_context
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.flops import sae_flops_per_vector
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import REPORTED, Losses, SparseAutoencoder
from steerscale.sae.config import SAESpec, specs_of
from steerscale.sae.initial import draw_weights, initialize_from_data
from steerscale.sae.state import load_state, state_fragments
from steerscale.train.config import RunConfig
from steerscale.train.sae_layout import check_transcoder
from steerscale.train.task import check_same

MEASURES = ("loss", "fvu", "mse", "l0", "dead", "penalty", "aux_loss")
"""What is recorded of each SAE: means over the step's vectors, in the scale it trains in; dead is a share of the latents."""


@dataclass(frozen=True)
class Vectors:
    """A micro-batch: activations [B, d] by hook point, of this rank's stage."""

    activations: dict[str, torch.Tensor]
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, 1), as engines ask for it."""
        return self.size, 1

    def of(self, hooks: Sequence[str]) -> torch.Tensor:
        """[B, d] side by side."""
        parts = [self.activations[hook] for hook in hooks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass
class Trained:
    """An SAE of this rank's stage with its engine."""

    number: int
    """Among all SAEs of the run."""
    sae: SparseAutoencoder
    engine: Engine
    applied_steps: int = 0


class SAETask:
    """SAEs on one stream. Build with `build_sae_task`."""

    def __init__(
        self, config: RunConfig, context: ParallelContext, stream: ActivationStream, *, peak_tflops: float | None = None
    ) -> None:
        assert config.sae is not None
        assert config.stream is not None
        assert config.data is not None
        self.config, self.context, self.stream = config, context, stream
        self.specs = specs_of(config.sae, stream.source.widths)
        for spec in self.specs:  # of a transformers model this is known only now
            check_transcoder(spec, {hook: place for place, hook in enumerate(stream.source.in_order)})
        stage = stage_context(context)
        self.trained = [
            _build(number, spec, config, stage)
            for number, spec in enumerate(self.specs)
            if spec.inputs[0] in stream.source.owned
        ]
        self._text = held_out(config.stream, config.data, stream.source, samples=config.train.eval_samples)
        self._peak_tflops, self._lm_flops = peak_tflops, _lm_flops(config)
        self._l0: dict[str, float] = {}
        self._fresh = True

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Fill the shuffle buffer."""
        self.stream.fill(should_stop)

    def micro_batches(self, consumed_samples: int, num_micro_batches: int) -> list[Vectors]:
        """The stream's next vectors; it knows itself where it stands."""
        size = self.context.layout.micro_batch_size
        activations = self.stream.next(size * num_micro_batches).activations
        if self._fresh:
            self._initialize(Vectors(activations, size * num_micro_batches))
        cut = {hook: x.split(size) for hook, x in activations.items()}
        return [
            Vectors({hook: parts[index] for hook, parts in cut.items()}, size) for index in range(num_micro_batches)
        ]

    def _initialize(self, batch: Vectors) -> None:
        self._fresh = False
        for trained in self.trained:
            spec = trained.sae.spec
            initialize_from_data(trained.sae, batch.of(spec.inputs), batch.of(spec.outputs))
            trained.engine.adopt_weights()

    def train_step(
        self, micro_batches: Sequence[Vectors], *, step: int, lr: float, extra: tuple[float, ...], timer: Timer
    ) -> StepResult:
        """A step of each SAE by its own engine; then one all-reduce over all ranks of every SAE's figures and `extra`."""
        width = 3 + len(MEASURES)
        figures = torch.zeros(len(self.specs) * width + len(extra), dtype=torch.float64)
        for trained in self.trained:
            own = self._step(trained, micro_batches, step=step, lr=lr, timer=timer)
            at = trained.engine.context.at
            if at.data == 0 and at.tensor == 0:  # one rank of the stage tells
                begin = trained.number * width
                figures[begin : begin + width] = torch.tensor(own, dtype=torch.float64)
        if extra:
            figures[len(self.specs) * width :] = torch.tensor(extra, dtype=torch.float64)
        figures = figures.to(self.context.device)
        dist.all_reduce(figures)
        return self._result(figures.tolist(), width)

    def _step(
        self, trained: Trained, micro_batches: Sequence[Vectors], *, step: int, lr: float, timer: Timer
    ) -> list[float]:
        """[applied, vectors, squared gradient norm, *MEASURES], the same on every rank of the stage."""
        sae = trained.sae
        sae.before_step(step)
        result = trained.engine.train_step(micro_batches, sae_forward, lr=lr, timer=timer)
        if result.applied:
            trained.applied_steps += 1
            with timer("optimizer"):
                sae.after_update()
                trained.engine.adopt_weights()
        measures = _measures(sae, result.totals)
        return [float(result.applied), result.totals.tokens, result.grad_norm**2, *measures.values()]

    def _result(self, figures: list[float], width: int) -> StepResult:
        metrics: dict[str, float] = {}
        rows = [figures[begin : begin + width] for begin in range(0, len(self.specs) * width, width)]
        for spec, (_, _, _, *measures) in zip(self.specs, rows):
            metrics.update({f"{spec.name}/{name}": value for name, value in zip(MEASURES, measures)})
            self._l0[spec.name] = metrics[f"{spec.name}/l0"]
        totals = Totals(
            loss_sum=sum(row[3] * row[1] for row in rows),
            tokens=int(sum(row[1] for row in rows)),
            extra=tuple(figures[len(rows) * width :]),
        )
        grad_norm = math.sqrt(sum(row[2] for row in rows)) if all(math.isfinite(row[2]) for row in rows) else math.nan
        applied = all(row[0] == 1 for row in rows)
        return StepResult(totals=totals, grad_norm=grad_norm, applied=applied, metrics=metrics)

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Each SAE on held-out text; see `interp.sae_eval`."""
        if self._text is None:
            return {}
        found = evaluate_saes(
            self.specs,
            {trained.sae.spec.name: trained.sae for trained in self.trained},
            self.stream.source,
            self._text,
            self.context,
            should_stop=should_stop,
        )
        return {f"{name}/{key}": value for name, one in found.items() for key, value in one.values.items()}

    def throughput(self, seconds: float, layout: ParallelLayout) -> dict[str, float | None]:
        """Vectors, and FLOPs of both the language model's forward pass and the SAEs' training; see docs/throughput.md."""
        placement = self.config.placement()
        ranks = layout.world_size + (0 if placement is None else placement.producers.world_size)
        vectors, gpu_seconds = layout.global_batch_size, seconds * ranks
        per_vector = sum(
            sae_flops_per_vector(d_in=spec.d_in, d_out=spec.d_out, width=spec.width, l0=self._l0.get(spec.name, 0.0))
            for spec in self.specs
        )
        if self._lm_flops is not None:
            per_vector += self._lm_flops
        tflops = None if self._lm_flops is None else vectors * per_vector / gpu_seconds / 1e12
        return {
            "samples_per_second": vectors / seconds,
            "tokens_per_second_per_gpu": vectors / gpu_seconds,
            "model_tflops_per_gpu": tflops,
            "mfu": None if tflops is None or self._peak_tflops is None else tflops / self._peak_tflops,
        }

    def describe(self) -> str:
        """What is trained, in a line."""
        kinds = ", ".join(
            f"{spec.name}: {spec.config.architecture} {spec.d_in} -> {spec.width:,}" for spec in self.specs
        )
        return f"{len(self.specs)} SAEs on {self.stream.source.identity} ({kinds})"

    def consumed(self) -> int:
        """Every replica's vectors once."""
        return self.stream.consumed.value if self.context.counts_once else 0

    def fragments(self) -> list[Fragment]:
        """Weights and optimizer state of this stage's SAEs, and what else belongs to them."""
        return [
            fragment
            for trained in self.trained
            for fragment in [*trained.engine.fragments(), *state_fragments(trained.sae)]
        ]

    def state(self) -> dict[str, Any]:
        """Shapes of the SAEs, where the stream stands, and how many updates each SAE has had."""
        steps: list = [None] * self.context.layout.world_size
        dist.all_gather_object(steps, {trained.number: trained.applied_steps for trained in self.trained})
        merged = {number: count for part in steps for number, count in part.items()}
        return {
            "model": {spec.name: spec.shape for spec in self.specs},
            "sae": {spec.name: asdict(spec) for spec in self.specs},
            "stream": self.stream.state(),
            "fresh": self._fresh,
            "applied_steps": [merged[number] for number in range(len(self.specs))],
        }

    def resume(self, state: dict[str, Any], reader: FragmentReader, *, applied_steps: int, consumed_hash: int) -> None:
        """Take over weights, optimizer states, counters and the place in the stream."""
        check_same(state["model"], {spec.name: spec.shape for spec in self.specs}, at="sae")
        applied = dict(
            zip(state["model"], state["applied_steps"], strict=True)
        )  # SAEs may be named in another order now
        for trained in self.trained:
            trained.applied_steps = applied[trained.sae.spec.name]
            trained.engine.load(reader, optimizer_steps=trained.applied_steps)
            load_state(trained.sae, reader)
        self.stream.load(state["stream"])
        first = self.context.counts_once and self.context.at.data == 0
        self.stream.consumed.value = consumed_hash if first else 0
        self._fresh = state.get("fresh", False)

    def close(self) -> None:
        """Let go of the SAEs and the language model."""
        for trained in reversed(self.trained):  # what the first one set up serves all
            trained.engine.close()
        self.stream.close()


def build_sae_task(
    config: RunConfig,
    context: ParallelContext,
    *,
    peak_tflops: float | None = None,
    source: ActivationSource | None = None,
) -> SAETask:
    """The stream of the language model, and the SAEs of this rank's stage with their initial weights.

    `source` is the model if it is elsewhere; None: it is loaded here.
    """
    if config.sae is None or config.stream is None or config.data is None:
        raise ConfigError("training SAEs needs the sections sae, stream and data")
    stream = build_stream(
        config.stream, data=config.data, hooks=config.sae.all_hooks, context=context, seed=config.seed, source=source
    )
    return SAETask(config, context, stream, peak_tflops=peak_tflops)


def _lm_flops(config: RunConfig) -> float | None:
    """FLOPs of the language model's forward pass a token, to the last hook point; None where its shape is not known."""
    assert config.sae is not None
    try:
        return stream_cost(config.model, config.sae.all_hooks, tokens=1).forward_flops_per_token
    except ConfigError:  # module paths of a transformers model
        return None


def _build(number: int, spec: SAESpec, config: RunConfig, stage: ParallelContext) -> Trained:
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    sae = ARCHITECTURES[spec.config.architecture](spec, stage, dtype=dtype)
    draw_weights(sae, seed=config.seed)
    if config.engine.name == "deepspeed":
        return Trained(number=number, sae=sae, engine=_deepspeed_engine(sae, config, stage))
    engine = MegatronEngine(
        [sae],
        shards=list(sae.shards()),
        config=sae.config,
        # Parameters are float32 whatever the products are computed in, and one shallow layer leaves nothing to overlap.
        engine=replace(config.engine, precision="fp32", overlap=False),
        optim=config.optim,
        context=stage,
        num_reported=len(REPORTED),
    )
    return Trained(number=number, sae=sae, engine=engine)


def _deepspeed_engine(sae: SparseAutoencoder, config: RunConfig, stage: ParallelContext) -> Engine:
    sae.into_main_grad = False  # Megatron-Core's gradient buffers; DeepSpeed has none
    return DeepSpeedEngine(
        sae,
        shards=list(sae.shards()),
        engine=replace(config.engine, precision="fp32", overlap=False),
        optim=config.optim,
        context=stage,
        tokens=lambda batch: torch.tensor(float(batch.size)),
        num_reported=len(REPORTED),
    )


def sae_forward(batch: Vectors, sae: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """Losses of a micro-batch by an SAE inside Megatron-Core's data parallelism, as `engines.megatron.Forward` has it."""
    spec = cast("SparseAutoencoder", sae.module).spec
    inputs = batch.of(spec.inputs)
    losses: Losses = sae(inputs, batch.of(spec.outputs) if spec.is_transcoder else inputs)
    tokens = torch.full((), batch.size, dtype=torch.int, device=inputs.device)

    def total(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        report = torch.cat((torch.stack((losses.complete, tokens)), losses.reported)).double()
        return loss, tokens, report

    return losses.total, total


def _measures(sae: SparseAutoencoder, totals: Totals) -> dict[str, float]:
    sums, count = dict(zip(REPORTED, totals.reported)), max(totals.tokens, 1)
    per_vector = {name: value / count for name, value in sums.items()}
    values = (
        totals.loss,
        sums["squared_error"] / sums["variance"] if sums["variance"] else math.nan,
        per_vector["squared_error"],
        per_vector["l0"],
        sae.num_dead / sae.spec.width,
        per_vector["penalty"],
        per_vector["aux_error"],
    )
    return dict(zip(MEASURES, values, strict=True))
