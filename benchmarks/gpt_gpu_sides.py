"""The sides of gpt_gpu.py: our loop, plain PyTorch, transformers and Megatron-Core's own layers, on the same weights and data.

All of them the same arithmetic: bf16 weights and activations, gradients added up in float32 over the micro-batches, clipping,
AdamW on float32 main weights, losses in float32. Each runs in a process of its own and measures itself.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpt_gpu_cases import OPTIM, SEED, Case, run_config
from steerscale.data.dataset import SampleStream
from steerscale.data.loader import MicroBatch, MicroBatchLoader
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.models.gpt import transformer_config
from steerscale.models.hf.llama import LLAMA
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.megatron import get_gpt_layer_local_spec
from steerscale.testing.reference import ReferenceGPT, make_adamw
from steerscale.train.gpt import sum_losses
from steerscale.train.profile import StepProfiler
from steerscale.train.profile_config import ProfileConfig

Losses = Callable[[MicroBatch], torch.Tensor]
"""Micro-batch -> sum of its losses."""


class Clock:
    """When each step begins, with the device idle; and the peak of memory once the first steps are over."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._device = case, device
        self._begun: list[float] = []
        self._built = time.perf_counter()
        self._reserved = 0

    def turn(self) -> None:
        """A step begins now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            if len(self._begun) == self._case.warmup:
                self._reserved = torch.cuda.max_memory_reserved()
                torch.cuda.reset_peak_memory_stats()
        self._begun.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        """Seconds of the measured steps and of everything before them; GiB at the fullest moment."""
        begun, warmup = self._begun, self._case.warmup
        seconds = [after - before for before, after in zip(begun[warmup:], begun[warmup + 1 :])]
        assert len(seconds) == self._case.steps
        figures: dict[str, Any] = {
            "step_seconds": [round(value, 6) for value in seconds],
            "before_seconds": round(begun[warmup] - self._built, 2),
        }
        if self._device.type == "cuda":
            reserved = max(self._reserved, torch.cuda.max_memory_reserved())
            figures |= {
                "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                "reserved_gib": round(reserved / 2**30, 3),
            }
        return figures


class ClockedProfiler(StepProfiler):
    """The loop asks at the beginning of each step whether to trace it."""

    def __init__(self, clock: Clock, run_dir: Path, device: torch.device) -> None:
        super().__init__(ProfileConfig(), run_dir=run_dir, rank=0, device=device)
        self._clock = clock

    def step(self, step: int) -> Any:
        """Nothing is traced, the time is taken."""
        self._clock.turn()
        return nullcontext()


@dataclass(frozen=True)
class Place:
    """Where a side runs."""

    data: Path
    run_dir: Path
    device: torch.device


def _ours(case: Case, place: Place, *, compiled: bool) -> tuple[Clock, list[float]]:
    from steerscale.checkpoint.store import CheckpointStore
    from steerscale.metrics import Recorder, read_records
    from steerscale.train.gpt import build_gpt_task
    from steerscale.train.loop import Loop, Progress
    from steerscale.train.signals import StopRequest

    config = run_config(case, place.data, place.run_dir, compiled=compiled)
    clock = Clock(case, place.device)
    with (
        initialize(config.layout()) as context,
        closing(build_gpt_task(config, context)) as task,
        closing(Recorder(place.run_dir, writes=True, tensorboard=False)) as recorder,
    ):
        loop = Loop(
            task,
            config=config,
            context=context,
            store=CheckpointStore(place.run_dir / "checkpoints", config.checkpoint),
            recorder=recorder,
            stop=StopRequest(),
            progress=Progress(),
            profiler=ClockedProfiler(clock, place.run_dir, context.device),
        )
        assert loop.run()
    return clock, [record["loss"] for record in read_records(place.run_dir, "train")]


def _pytorch(case: Case, place: Place) -> tuple[Clock, list[float]]:
    clock = Clock(case, place.device)
    model = _reference(case, place)

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        logits = model(batch).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
        return (losses * batch.loss_mask_BS.flatten()).sum()

    # On a CPU --quick asks only whether it runs: without the minutes of a C++ compiler.
    backend = "inductor" if place.device.type == "cuda" else "aot_eager"
    return clock, _train(case, place, clock, model, torch.compile(loss_of, backend=backend))


def _transformers(case: Case, place: Place) -> tuple[Clock, list[float]]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    clock = Clock(case, place.device)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    config = LlamaConfig(**LLAMA.write_config(case.model), **special)
    with place.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(place.device)  # whatever of it was made elsewhere
    wholes, tensors = dict(_reference(case, place).named_parameters()), model.state_dict()
    with torch.no_grad():
        for name, recipe in LLAMA.recipes(case.model).items():
            rows = wholes[name].split([piece.rows for piece in recipe.pieces])
            for piece, part in zip(recipe.pieces, rows):
                if piece.source is not None:
                    tensors[piece.source][piece.start : piece.start + piece.rows].copy_(part)
    del wholes, tensors
    model.train()

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        logits = model(input_ids=batch.tokens_BS).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
        return (losses * batch.loss_mask_BS.flatten()).sum()

    return clock, _train(case, place, clock, model, loss_of)


def _megatron(case: Case, place: Place) -> tuple[Clock, list[float]]:
    """Megatron-Core's GPTModel on its local spec, its schedule, gradient buffers and optimizer."""
    from megatron.core.models.gpt import GPTModel

    clock, model = Clock(case, place.device), case.model
    with initialize(case.layout) as context, closing(_loader(case, place)) as loader:
        config = transformer_config(model, context, precision="bf16")
        # Its own fusion of the gate, compiled by torch; our configuration is for layers of our own.
        config.bias_activation_fusion = model.gated and context.device.type == "cuda"
        with context.device:
            chunk: Any = GPTModel(
                config,
                get_gpt_layer_local_spec(normalization=config.normalization),
                vocab_size=model.padded_vocab,
                max_sequence_length=model.seq_len,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="rope" if model.position == "rotary" else "learned_absolute",
                rotary_base=int(model.rope_theta),
                pg_collection=context.groups,
            )
        chunk.model, chunk.first_layer = model, 0
        initialize_parameters([chunk], context, seed=SEED)
        engine = MegatronEngine(
            [chunk],
            shards=[],
            config=config,
            engine=EngineConfig(precision="bf16", kernels="torch"),
            optim=OPTIM,
            context=context,
        )
        positions = torch.arange(model.seq_len, device=context.device).unsqueeze(0)

        def forward(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            batch = micro_batch.to(context.device, non_blocking=True)
            output = chunk(batch.tokens_BS, positions, None, labels=batch.labels_BS)
            return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

        losses = [
            engine.train_step(batches, forward, lr=OPTIM.lr).totals.loss for batches in _steps(case, loader, clock)
        ]
        engine.close()
    return clock, losses


def _train(case: Case, place: Place, clock: Clock, model: torch.nn.Module, loss_of: Losses) -> list[float]:
    """The loop of the sides that have none; losses of all steps."""
    losses = []
    with closing(_loader(case, place)) as loader, _main_weights(model) as update:
        for batches in _steps(case, loader, clock):
            tokens = sum(float(batch.loss_mask_BS.sum()) for batch in batches)  # on the host: they are still there
            total = torch.zeros((), device=place.device)
            for batch in batches:
                loss = loss_of(batch.to(place.device, non_blocking=True))
                (loss / tokens).backward()
                total += loss.detach()
            update()
            losses.append(float(total) / tokens)
    return losses


@contextmanager
def _main_weights(model: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Float32 main weights of bf16 parameters: gradients are added up in theirs; yields the optimizer step."""
    parameters = list(model.parameters())
    mains = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    by_id = {id(parameter): main for parameter, main in zip(parameters, mains)}
    for main in mains:
        main.grad = torch.zeros_like(main)

    def accumulate(parameter: torch.Tensor) -> None:
        by_id[id(parameter)].grad.add_(parameter.grad)  # type: ignore[union-attr,arg-type]
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(accumulate) for parameter in parameters]
    adamw = make_adamw(torch.nn.ParameterList(mains), OPTIM)  # type: ignore[arg-type]

    @torch.no_grad()
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(mains, OPTIM.clip, foreach=True)
        adamw.step()
        torch._foreach_copy_(parameters, mains)
        torch._foreach_zero_([main.grad for main in mains])

    yield update
    for handle in handles:
        handle.remove()


def _reference(case: Case, place: Place) -> ReferenceGPT:
    """The plain model in bf16 with the weights that our run draws."""
    with place.device:
        model = ReferenceGPT(case.model).to(torch.bfloat16)
    model.first_layer = 0  # type: ignore[assignment]
    whole = ParallelContext(layout=ParallelLayout(), rank=0, device=place.device, groups=None)  # type: ignore[arg-type]
    initialize_parameters([model], whole, seed=SEED)  # type: ignore[list-item]
    return model


def _loader(case: Case, place: Place) -> MicroBatchLoader:
    """Our run's data loader: the same samples for everybody, prepared on a thread."""
    config = run_config(case, place.data, place.run_dir, compiled=False)
    assert config.data is not None
    return MicroBatchLoader(
        SampleStream(config.data, seq_len=case.model.seq_len, seed=SEED),
        data_rank=0,
        data_size=1,
        micro_batch_size=case.micro_batch_size,
        pin_memory=place.device.type == "cuda",
    )


def _steps(case: Case, loader: MicroBatchLoader, clock: Clock) -> Iterator[Sequence[MicroBatch]]:
    for step in range(case.total_steps):
        clock.turn()
        yield loader.step(step * case.micro_batch_size * case.micro_batches, case.micro_batches)


SIDES: dict[str, Callable[[Case, Place], tuple[Clock, list[float]]]] = {
    "ours": lambda case, place: _ours(case, place, compiled=False),
    "ours_compiled": lambda case, place: _ours(case, place, compiled=True),
    "pytorch": _pytorch,
    "transformers": _transformers,
    "megatron": _megatron,
}
"""Name -> (case, place) -> (times, losses of all steps)."""


def run_side(name: str, case: Case, data: Path, run_dir: Path) -> dict[str, Any]:
    """Run one side in this process: its figures, or why there are none."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    run_dir.mkdir(parents=True)
    try:
        clock, losses = SIDES[name](case, Place(data, run_dir, device))
    except RuntimeError as error:
        # torch.OutOfMemoryError, or what a compiler or an extension wrapped it in.
        if "out of memory" not in str(error):
            raise
        return {"out_of_memory": str(error).splitlines()[0]}
    return {**clock.figures(), "losses": losses}
