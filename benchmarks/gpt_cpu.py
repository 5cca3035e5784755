"""GPT training on the CPU: our loop against transformers' Trainer and against the step's matrix products alone.

    OMP_NUM_THREADS=2 python benchmarks/gpt_cpu.py [--sizes 10m-llama 50m-llama] [--rounds 9] [--threads 2] [--quick]

Sides, each in a process of its own, steps taking turns; the first two rounds are warm-up and figures are medians:

- gemm: every matrix product of a step (forward, and the gradients of inputs and weights of all linear layers and of the head)
  at the same shapes, on matrices of their own; the bound. The products inside of attention are not in it.
- ours: `train.loop.Loop` as `python -m launch.train` runs it on one rank, data loader, clipping, metrics and all.
- transformers: `Trainer` on `LlamaForCausalLM` (SDPA attention, fused AdamW), with gradient accumulation.

Both train the same Llama from the same weights on the same samples in float32 with the same AdamW, clipping and learning
rate; their losses are compared. A step's time is from the end of the one before to its own end. At the end one step of each is
traced and its time shared out as by `steerscale profile`; what is in no operation is Python, seen from above: tracing adds to
it. litgpt's trainer is lightning's Fabric, which is no dependency here: it is not compared.
The last line is one JSON object with tokens per second and the ratios to the others.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.gpt_overhead import SIZES, Size
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.data.config import DataConfig
from steerscale.data.indexed import IndexedWriter
from steerscale.data.manifest import DatasetManifest, SplitInfo, TokenizerInfo
from steerscale.engines.config import EngineConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig
from steerscale.train.profile import StepProfiler
from steerscale.train.profile_config import ProfileConfig
from steerscale.train.profile_trace import DIRECTORY, find_traces, read_trace

TRAINERS = ("ours", "transformers")
SIDES = ("gemm", *TRAINERS)
WARMUP = 2
LR = 1e-4
SEED = 0
EOS = 0


class End(Exception):
    """No more steps are wanted."""


class Pace:
    """Lets a training loop take one step at a time, and reports how long each took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started: tuple[float, float] | None = None
        self.profiled = False

    def turn(self) -> None:
        """The step before is done: report it, then wait for leave to take the next one. Raises End when there is none."""
        now = time.perf_counter(), time.process_time()
        begun = self._started
        self._connection.send(None if begun is None else (now[0] - begun[0], now[1] - begun[1]))
        command = self._connection.recv()
        if command == "end":
            raise End
        self.profiled = command == "profile"
        self._started = time.perf_counter(), time.process_time()


def main() -> None:
    """Measure and print."""
    args = _arguments()
    names, rounds = (["quick"], 2) if args.quick else (args.sizes, args.rounds)
    results = {name: measure(name, rounds=rounds, threads=args.threads) for name in names}
    ratios = {
        key: min(result["ratios"][key] for result in results.values()) for key in ("to_transformers", "to_gemm_bound")
    }
    environment = {"threads": args.threads, "rounds": rounds, "torch": torch.__version__}
    print(json.dumps({**ratios, **environment, "sizes": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [name for name in SIZES if name.endswith("llama")]
    parser.add_argument("--sizes", nargs="+", choices=choices, default=choices)
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    return parser.parse_args()


def measure(name: str, *, rounds: int, threads: int) -> dict[str, Any]:
    """Alternate steps of all sides; print a table; return the figures."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory(prefix="gpt_cpu-") as folder:
        directory = Path(folder)
        _write_data(directory / "data", size, steps=rounds + WARMUP + 2)
        _write_weights(directory / "weights", size)
        workers = {side: _start(side, name, threads, directory) for side in SIDES}
        steps: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for number in range(rounds + WARMUP):
            # Taking turns at going first: nobody is always the one after a cold cache.
            for side in SIDES if number % 2 else reversed(SIDES):
                answer = _ask(workers[side][1], "step")
                if number >= WARMUP:
                    steps[side].append(answer)
        for side in TRAINERS:
            _ask(workers[side][1], "profile")
        losses = {side: _end(*worker) for side, worker in workers.items()}
        traces = {side: read_trace(find_traces(directory / side)[0]) for side in TRAINERS}
    _compare(losses)
    wall = {side: statistics.median(seconds for seconds, _ in steps[side]) for side in SIDES}
    cpu = {side: statistics.median(seconds for _, seconds in steps[side]) for side in SIDES}
    figures = {
        "parameters": size.model.num_parameters(),
        "tokens_per_step": size.tokens,
        "seconds_per_step": {side: round(wall[side], 4) for side in SIDES},
        "tokens_per_second": {side: round(size.tokens / wall[side], 1) for side in SIDES},
        "cpu_seconds_per_step": {side: round(cpu[side], 4) for side in SIDES},
        "ratios": {
            "to_transformers": round(wall["transformers"] / wall["ours"], 4),
            "to_gemm_bound": round(wall["gemm"] / wall["ours"], 4),
            "to_transformers_by_cpu_time": round(cpu["transformers"] / cpu["ours"], 4),
        },
        "gemm_gflops": round(_gemm_flops(size) / wall["gemm"] / 1e9, 1),
        "traced_seconds": {side: round(trace.seconds, 4) for side, trace in traces.items()},
        "parts": {
            side: {part: round(seconds, 4) for part, seconds in trace.parts.items()} for side, trace in traces.items()
        },
        "longest": {
            side: [(kind, name, round(seconds, 4)) for kind, name, seconds in trace.longest[:8]]
            for side, trace in traces.items()
        },
    }
    _print(name, figures)
    return figures


def _compare(losses: dict[str, list[float]]) -> None:
    """A benchmark of something else would be worthless: both must have learned the same."""
    ours, theirs = losses["ours"], losses["transformers"]
    assert len(ours) >= len(theirs) > WARMUP
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs))
    assert worst < 1e-3, (ours, theirs)


def _print(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {figures['parameters']:,} parameters, {figures['tokens_per_step']:,} tokens a step")
    for side in SIDES:
        print(
            f"  {side:<14}{figures['seconds_per_step'][side]:9.4f} s a step{figures['tokens_per_second'][side]:10,.0f} tokens/s"
        )
    ratios = figures["ratios"]
    by_cpu_time = ratios["to_transformers_by_cpu_time"]
    print(f"  ours over transformers {ratios['to_transformers']:.3f} (goal 1.1), by CPU time {by_cpu_time:.3f}")
    print(f"  ours over the bound {ratios['to_gemm_bound']:.3f} (goal 0.9)")
    traced, parts = figures["traced_seconds"], figures["parts"]
    print(f"  {'seconds of a traced step':<28}" + "".join(f"{side:>24}" for side in TRAINERS))
    for part in parts["ours"]:
        cells = [f"{parts[side][part]:14.4f} ({parts[side][part] / traced[side]:6.1%})" for side in TRAINERS]
        print(f"  {'Python, waiting' if part == 'idle' else part:<28}" + "".join(f"{cell:>24}" for cell in cells))
    sys.stdout.flush()


def _write_data(directory: Path, size: Size, *, steps: int) -> None:
    """One long document of random tokens: enough for every step, and for a few sequences more."""
    directory.mkdir()
    count = (steps * size.micro_batches * size.micro_batch_size + 8) * size.model.seq_len + 1
    tokens = np.random.default_rng(SEED).integers(EOS + 1, size.model.tokens, count).astype(np.uint16)
    with IndexedWriter(directory / "train", dtype="uint16") as writer:
        writer.add(tokens.tobytes(), np.array([count], dtype=np.int32))
    DatasetManifest(
        tokenizer=TokenizerInfo(type="bpe", hash="random", vocab_size=size.model.tokens, eos_id=EOS),
        dtype="uint16",
        splits={"train": SplitInfo(documents=writer.documents, tokens=writer.tokens, bytes=writer.tokens)},
        fractions={"train": 1.0},
        seed=0,
        documents="line",
        text_key="text",
    ).write(directory)


def _llama(size: Size) -> Any:
    from transformers import LlamaConfig

    model = size.model
    return LlamaConfig(
        vocab_size=model.tokens,
        hidden_size=model.d_model,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_groups,
        max_position_embeddings=model.seq_len,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=EOS,
        use_cache=False,
    )


def _write_weights(directory: Path, size: Size) -> None:
    """The weights that both begin with."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(_llama(size)).save_pretrained(directory)


def _config(size: Size, directory: Path, *, steps: int) -> RunConfig:
    """A run of ours, as it would be on one rank."""
    return RunConfig(
        name="gpt_cpu",
        run_dir=str(directory / "ours"),
        model=size.model,
        data=DataConfig(path=str(directory / "data"), random_offset=False),
        train=TrainConfig(steps=steps, eval_interval=0, init_from=str(directory / "weights")),
        optim=OptimConfig(lr=LR, min_lr=0.0, schedule="constant"),
        parallel=ParallelConfig(micro_batch_size=size.micro_batch_size, gradient_accumulation_steps=size.micro_batches),
        # With one replica there is nothing to shard, and gathering it would be a copy of all parameters a step.
        engine=EngineConfig(distributed_optimizer=False),
        checkpoint=CheckpointConfig(at_end=False),
        metrics=MetricsConfig(interval=1, tensorboard=False),
        seed=SEED,
    )


def _start(side: str, name: str, threads: int, directory: Path) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, name, threads, directory), daemon=True)
    process.start()
    there.close()
    here.recv()  # built, and waiting for its first turn
    return process, here


def _ask(connection: Connection, command: str) -> Any:
    connection.send(command)
    return connection.recv()


def _end(process: Any, connection: Connection) -> list[float]:
    losses = _ask(connection, "end")
    process.join()
    return losses


def _serve(connection: Connection, side: str, name: str, threads: int, directory: Path) -> None:
    """The process of one side; its last word are the losses of its steps."""
    torch.set_num_threads(threads)
    train: dict[str, Callable[[Size, Path, Pace], list[float]]] = {
        "gemm": _products,
        "ours": _ours,
        "transformers": _transformers,
    }
    connection.send(train[side](SIZES[name], directory, Pace(connection)))


class PacedProfiler(StepProfiler):
    """At the beginning of each step the loop asks whether to trace it: that is where it waits for its turn."""

    def __init__(self, pace: Pace, run_dir: Path) -> None:
        super().__init__(ProfileConfig(), run_dir=run_dir, rank=0, device=torch.device("cpu"))
        self._pace = pace

    def step(self, step: int) -> AbstractContextManager[None]:
        """Wait for the turn; trace the step if that was asked for."""
        self._pace.turn()
        return self._traced(step) if self._pace.profiled else nullcontext()


def _ours(size: Size, directory: Path, pace: Pace) -> list[float]:
    from steerscale.checkpoint.store import CheckpointStore
    from steerscale.metrics import Recorder, read_records
    from steerscale.parallel.context import initialize
    from steerscale.train.gpt import build_gpt_task
    from steerscale.train.loop import Loop, Progress
    from steerscale.train.signals import StopRequest

    config = _config(size, directory, steps=10**6)
    run_dir = Path(config.run_dir)
    (run_dir / DIRECTORY).mkdir(parents=True)
    with (
        initialize(config.layout()) as context,
        closing(build_gpt_task(config, context)) as task,
        closing(Recorder(run_dir, writes=True, tensorboard=False)) as recorder,
    ):
        loop = Loop(
            task,
            config=config,
            context=context,
            store=CheckpointStore(run_dir / "checkpoints", config.checkpoint),
            recorder=recorder,
            stop=StopRequest(),
            progress=Progress(),
            profiler=PacedProfiler(pace, run_dir),
        )
        try:
            loop.run()
        except End:
            return [record["loss"] for record in read_records(run_dir, "train")]
    raise AssertionError("the loop ended by itself")


def _transformers(size: Size, directory: Path, pace: Pace) -> list[float]:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from steerscale.data.dataset import SampleStream

    (directory / "transformers").mkdir()
    profiler = StepProfiler(
        ProfileConfig(steps=[1]), run_dir=directory / "transformers", rank=0, device=torch.device("cpu")
    )

    class Turns(TrainerCallback):
        trace = ExitStack()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            pace.turn()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.trace.close()
            pace.turn()
            if pace.profiled:
                self.trace.enter_context(profiler.step(1))

    class Losses(TrainerCallback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.values += [logs["loss"]] if "loss" in logs else []

    class Samples(torch.utils.data.Dataset):
        def __init__(self) -> None:
            config = _config(size, directory, steps=1)
            assert config.data is not None
            self._stream = SampleStream(config.data, seq_len=size.model.seq_len, seed=SEED)

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(self._stream.tokens(position).astype(np.int64))
            # The model shifts labels itself: the last input's label goes with it.
            return {"input_ids": tokens[:-1], "shift_labels": tokens[1:], "labels": tokens[:-1]}

    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=size.micro_batch_size,
        gradient_accumulation_steps=size.micro_batches,
        max_steps=10**5,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=OptimConfig().weight_decay,
        adam_beta1=OptimConfig().beta1,
        adam_beta2=OptimConfig().beta2,
        adam_epsilon=OptimConfig().eps,
        max_grad_norm=OptimConfig().clip,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        seed=SEED,
    )
    model = LlamaForCausalLM.from_pretrained(directory / "weights", dtype=torch.float32, attn_implementation="sdpa")
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[losses, Turns()])
    try:
        trainer.train()
    except End:
        return losses.values
    raise AssertionError("the trainer ended by itself")


def _products(size: Size, directory: Path, pace: Pace) -> list[float]:
    """The matrix products of a step, each on matrices of its own."""
    tokens = size.micro_batch_size * size.model.seq_len
    weights = [torch.randn(rows, columns) for rows, columns in _matrices(size)]
    widths = {width for weight in weights for width in weight.shape}
    activations = {width: torch.randn(tokens, width) for width in widths}
    outputs = {width: torch.empty(tokens, width) for width in widths}
    gradients = [torch.empty_like(weight) for weight in weights]
    try:
        while True:
            pace.turn()
            for _ in range(size.micro_batches):
                for weight in weights:
                    torch.mm(activations[weight.shape[1]], weight.T, out=outputs[weight.shape[0]])
                for weight, gradient in zip(reversed(weights), reversed(gradients)):
                    torch.mm(activations[weight.shape[0]], weight, out=outputs[weight.shape[1]])
                    torch.mm(activations[weight.shape[0]].T, activations[weight.shape[1]], out=gradient)
    except End:
        return []


def _matrices(size: Size) -> list[tuple[int, int]]:
    """Rows and columns of every weight that is multiplied with, in the order of the forward pass."""
    model = size.model
    heads = (model.num_heads + 2 * model.kv_groups) * model.head_width
    layer = [
        (heads, model.d_model),
        (model.d_model, model.num_heads * model.head_width),
        ((2 if model.gated else 1) * model.ffn_width, model.d_model),
        (model.d_model, model.ffn_width),
    ]
    return [*layer * model.num_layers, (model.padded_vocab, model.d_model)]


def _gemm_flops(size: Size) -> float:
    return 6.0 * size.tokens * sum(rows * columns for rows, columns in _matrices(size))


if __name__ == "__main__":
    main()
