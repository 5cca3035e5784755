"""The sides of gpt_cpu.py: our loop, transformers' Trainer and the step's matrix products, on the same data and weights."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpt_cpu_litgpt
from benchmarks.gpt_overhead import Size
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
from steerscale.train.profile_trace import DIRECTORY

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


def write_data(directory: Path, size: Size, *, steps: int) -> None:
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


def write_weights(directory: Path, size: Size) -> None:
    """The weights that both begin with."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(_llama(size)).save_pretrained(directory)


def _config(size: Size, directory: Path, *, steps: int, side: str = "ours") -> RunConfig:
    """A run of ours, as it would be on one rank."""
    return RunConfig(
        name="gpt_cpu",
        run_dir=str(directory / side),
        model=size.model,
        data=DataConfig(path=str(directory / "data"), random_offset=False),
        train=TrainConfig(steps=steps, eval_interval=0, init_from=str(directory / "weights")),
        optim=OptimConfig(lr=LR, min_lr=0.0, schedule="constant"),
        parallel=ParallelConfig(micro_batch_size=size.micro_batch_size, gradient_accumulation_steps=size.micro_batches),
        engine=EngineConfig(compile="blocks" if side == "ours_compiled" else "none"),
        checkpoint=CheckpointConfig(at_end=False),
        metrics=MetricsConfig(interval=1, tensorboard=False),
        seed=SEED,
    )


class PacedProfiler(StepProfiler):
    """At the beginning of each step the loop asks whether to trace it: that is where it waits for its turn."""

    def __init__(self, pace: Pace, run_dir: Path) -> None:
        super().__init__(ProfileConfig(), run_dir=run_dir, rank=0, device=torch.device("cpu"))
        self._pace = pace

    def step(self, step: int) -> AbstractContextManager[None]:
        """Wait for the turn; trace the step if that was asked for."""
        self._pace.turn()
        return self._traced(step) if self._pace.profiled else nullcontext()


def _ours(side: str, size: Size, directory: Path, pace: Pace) -> list[float]:
    from steerscale.checkpoint.store import CheckpointStore
    from steerscale.metrics import Recorder, read_records
    from steerscale.parallel.context import initialize
    from steerscale.train.gpt import build_gpt_task
    from steerscale.train.host_memory import keep_freed_memory
    from steerscale.train.loop import Loop, Progress
    from steerscale.train.signals import StopRequest

    config = _config(size, directory, steps=10**6, side=side)
    run_dir = Path(config.run_dir)
    (run_dir / DIRECTORY).mkdir(parents=True)
    keep_freed_memory()
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


def _transformers(side: str, size: Size, directory: Path, pace: Pace) -> list[float]:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback

    from steerscale.data.dataset import SampleStream

    (directory / side).mkdir()
    profiler = StepProfiler(ProfileConfig(steps=[1]), run_dir=directory / side, rank=0, device=torch.device("cpu"))

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
    model = LlamaForCausalLM.from_pretrained(directory / "weights", dtype=torch.float32, attn_implementation="sdpa")
    arguments = _training_arguments(size, directory, compiled=side == "transformers_compiled")
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[losses, Turns()])
    try:
        trainer.train()
    except End:
        return losses.values
    raise AssertionError("the trainer ended by itself")


def _litgpt(side: str, size: Size, directory: Path, pace: Pace) -> list[float]:
    (directory / side).mkdir()
    profiler = StepProfiler(ProfileConfig(steps=[1]), run_dir=directory / side, rank=0, device=torch.device("cpu"))
    trace, losses = ExitStack(), []

    def begin_step() -> None:
        trace.close()
        pace.turn()
        if pace.profiled:
            trace.enter_context(profiler.step(1))

    try:
        gpt_cpu_litgpt.train(_config(size, directory, steps=1), size, directory / "weights", begin_step, losses.append)
    except End:
        return losses
    raise AssertionError("litgpt ended by itself")


def _training_arguments(size: Size, directory: Path, *, compiled: bool) -> Any:
    """Trainer's settings for the run that `_config` describes."""
    from transformers import TrainingArguments

    return TrainingArguments(
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
        torch_compile=compiled,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        seed=SEED,
    )


def _products(side: str, size: Size, directory: Path, pace: Pace) -> list[float]:
    """The matrix products of a step, each on matrices of its own; "gemm" leaves out those of the attention."""
    tokens = size.micro_batch_size * size.model.seq_len
    weights = [torch.randn(rows, columns) for rows, columns in _matrices(size)]
    widths = {width for weight in weights for width in weight.shape}
    activations = {width: torch.randn(tokens, width) for width in widths}
    outputs = {width: torch.empty(tokens, width) for width in widths}
    gradients = [torch.empty_like(weight) for weight in weights]
    attention = _attention_products(size) if side == "gemm_attention" else lambda: None
    try:
        while True:
            pace.turn()
            for _ in range(size.micro_batches):
                for weight in weights:
                    torch.mm(activations[weight.shape[1]], weight.T, out=outputs[weight.shape[0]])
                for weight, gradient in zip(reversed(weights), reversed(gradients)):
                    torch.mm(activations[weight.shape[0]], weight, out=outputs[weight.shape[1]])
                    torch.mm(activations[weight.shape[0]].T, activations[weight.shape[1]], out=gradient)
                attention()
    except End:
        return []


def _attention_products(size: Size) -> Callable[[], None]:
    """A micro-batch's products of queries, keys, values and scores, forward and backward, whole and not half for causality."""
    model = size.model
    heads, length, width = size.micro_batch_size * model.num_heads, model.seq_len, model.head_width
    narrow, scores = torch.randn(heads, length, width), torch.randn(heads, length, length)
    narrow_out, scores_out = torch.empty_like(narrow), torch.empty_like(scores)

    def run() -> None:
        for _ in range(model.num_layers):
            for _ in range(2):  # queries with keys; the output's gradient with values
                torch.bmm(narrow, narrow.mT, out=scores_out)
            for _ in range(2):  # scores with values; the scores' gradient with keys
                torch.bmm(scores, narrow, out=narrow_out)
            for _ in range(2):  # the gradients of keys and of values
                torch.bmm(scores.mT, narrow, out=narrow_out)

    return run


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


def gemm_flops(size: Size) -> float:
    """Of a step's matrix products without the attention's, forward and backward."""
    return 6.0 * size.tokens * sum(rows * columns for rows, columns in _matrices(size))


SIDES: dict[str, Callable[[str, Size, Path, Pace], list[float]]] = {
    "gemm": _products,
    "gemm_attention": _products,
    "ours": _ours,
    "ours_compiled": _ours,
    "transformers": _transformers,
    "transformers_compiled": _transformers,
    "litgpt_compiled": _litgpt,
}
"""Name -> (name, size, directory, pace) -> losses of its steps."""
BOUNDS = ("gemm", "gemm_attention")
"""Sides that train nothing."""
