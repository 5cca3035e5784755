"""Training a GPT: the model, its data and its throughput, behind the loop's `Task`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream
from steerscale.data.loader import MicroBatch, MicroBatchLoader
from steerscale.engines.base import Engine, StepResult, Timer, Totals
from steerscale.engines.deepspeed import DeepSpeedEngine
from steerscale.engines.deepspeed_config import write_ds_config
from steerscale.engines.deepspeed_pipeline import DeepSpeedPipelineEngine, Pipeline
from steerscale.engines.megatron import MegatronEngine
from steerscale.errors import ConfigError
from steerscale.models.core_attention import document_begins
from steerscale.models.gpt import build_chunks, losses_of, transformer_config
from steerscale.models.gpt_layers import BlockLayer, gpt_layers
from steerscale.models.hf.load import load_hf
from steerscale.models.layer import compile_layers
from steerscale.models.sharding import Chunk, initialize_parameters, named_shards
from steerscale.parallel.context import ParallelContext, stage_context
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.megatron import TransformerConfig
from steerscale.parallel.shards import Shard
from steerscale.planning.flops import model_flops_per_token
from steerscale.planning.throughput import throughput
from steerscale.train.config import FREE_MODEL_KEYS, RunConfig
from steerscale.train.kernels import check_fp8_device, run_kernels
from steerscale.train.task import check_same

EVAL_CHUNK = 8
"""Micro-batches (times stages) an evaluation holds at once."""


class GPTTask:
    """A GPT on packed text. Build with `build_gpt_task`."""

    def __init__(
        self, *, config: RunConfig, context: ParallelContext, engine: Engine, peak_tflops: float | None
    ) -> None:
        if config.data is None:
            raise ConfigError("data.path or data.blend must be given to train")
        self.config, self.context, self.engine, self._data = config, context, engine, config.data
        self._peak_tflops = peak_tflops
        self._varlen = run_kernels(config, on_cuda=context.device.type == "cuda").varlen
        self._consumed = ConsumedHash()
        stream = SampleStream(self._data, seq_len=config.model.seq_len, seed=config.seed)
        self._train = self._loader(stream, num_prefetch=self._data.num_prefetch, consumed=self._consumed)
        self._valid = None
        if all("valid" in manifest.splits for manifest in stream.manifests):
            self._valid_stream = SampleStream(self._data, seq_len=config.model.seq_len, split="valid", shuffle=False)
            self._valid_stream.limit(config.train.eval_samples)
            self._valid = self._loader(self._valid_stream, num_prefetch=0, consumed=None)

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Nothing takes long."""

    def micro_batches(self, consumed_samples: int, num_micro_batches: int) -> list[MicroBatch]:
        """This replica's part of a step."""
        return self._train.step(consumed_samples, num_micro_batches)

    def forward(self, micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        """Hidden states, or on the last stage the losses [B, S], and how to sum them."""
        batch = micro_batch.to(self.context.device, non_blocking=True)
        documents = batch.documents_BS
        if self._varlen and micro_batch.documents_BS is not None:
            documents = document_begins(micro_batch.documents_BS).to(self.context.device, non_blocking=True)
        output = chunk(batch.tokens_BS, batch.positions_BS, documents, batch.labels_BS)
        return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

    def train_step(
        self, micro_batches: Sequence[MicroBatch], *, step: int, lr: float, extra: tuple[float, ...], timer: Timer
    ) -> StepResult:
        """One optimizer step, with dropout of its own."""
        self.engine.seed_dropout(self.config.seed + step)
        return self.engine.train_step(micro_batches, self.forward, lr=lr, extra=extra, timer=timer)

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Loss a token, perplexity and bits per byte on the held-out split."""
        if self._valid is None:
            return {}
        layout, samples = self.context.layout, self._valid_stream.num_samples or 0
        # Whole rounds of micro-batches: the interleaved schedule needs a multiple of the stages.
        per_call = EVAL_CHUNK * layout.pipeline
        stride = per_call * layout.micro_batch_size * layout.data
        loss_sum, tokens = 0.0, 0
        for begin in range(0, samples, stride):
            if should_stop():
                return {}
            totals: Totals = self.engine.evaluate(self._valid.step(begin, per_call), self.forward)
            loss_sum, tokens = loss_sum + totals.loss_sum, tokens + totals.tokens
        loss = loss_sum / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self._valid_stream.bytes_per_token,
            "tokens": tokens,
        }

    def throughput(self, seconds: float, layout: ParallelLayout) -> dict[str, float | None]:
        """Tokens, FLOPs and utilisation of an iteration; see docs/throughput.md."""
        model, recompute = self.config.model, self.config.engine.recompute
        return asdict(
            throughput(seconds, model=model, layout=layout, recompute=recompute, peak_tflops=self._peak_tflops)
        )

    def describe(self) -> str:
        """Size, cost and batch."""
        model = self.config.model
        return (
            f"{model.num_parameters():,} parameters, {model_flops_per_token(model):.4g} model FLOPs a token, global batch "
            f"{self.context.layout.global_batch_size} x {model.seq_len} tokens"
        )

    def consumed(self) -> int:
        """Every replica's samples once: the first tensor rank of the last stage counts them."""
        return self._consumed.value if self.context.counts_once else 0

    def fragments(self) -> list[Fragment]:
        """Weights and optimizer state."""
        return self.engine.fragments()

    def state(self) -> dict[str, Any]:
        """The model's shape, and what of the engine is no tensor."""
        return {"model": asdict(self.config.model), "engine": self.engine.state()}

    def resume(self, state: dict[str, Any], reader: FragmentReader, *, applied_steps: int, consumed_hash: int) -> None:
        """Take over weights and optimizer state; one rank goes on from the total of the hash, the others begin at 0."""
        check_same(state["model"], asdict(self.config.model), at="model", free=FREE_MODEL_KEYS)
        self.engine.load(reader, optimizer_steps=applied_steps)
        self.engine.load_state(state.get("engine", {}))
        first = self.context.counts_once and self.context.at.data == 0
        self._consumed.value = consumed_hash if first else 0

    def close(self) -> None:
        """Stop the prefetching threads and let go of the model."""
        self.engine.close()
        self._train.close()
        if self._valid is not None:
            self._valid.close()

    def _loader(self, stream: SampleStream, *, num_prefetch: int, consumed: ConsumedHash | None) -> MicroBatchLoader:
        data = self._data
        return MicroBatchLoader(
            stream,
            data_rank=self.context.at.data,
            data_size=self.context.layout.data,
            micro_batch_size=self.context.layout.micro_batch_size,
            reset_at_document_end=data.reset_at_document_end,
            mask_document_end=data.mask_document_end,
            num_prefetch=num_prefetch,
            pin_memory=self.context.device.type == "cuda",
            consumed=consumed,
        )


def build_gpt_task(config: RunConfig, context: ParallelContext, *, peak_tflops: float | None = None) -> GPTTask:
    """Model chunks of this rank with their initial weights (drawn or imported), the engine, and the data."""
    return GPTTask(config=config, context=context, engine=build_engine(config, context), peak_tflops=peak_tflops)


def build_engine(config: RunConfig, context: ParallelContext) -> Engine:
    """The engine that config.engine names, with this rank's part of the model in it."""
    return (_deepspeed_engine if config.engine.name == "deepspeed" else _megatron_engine)(config, context)


def _megatron_engine(config: RunConfig, context: ParallelContext) -> MegatronEngine:
    transformer = _transformer_config(config, context)
    chunks = build_chunks(config.model, transformer, context)
    return MegatronEngine(
        chunks,
        shards=_filled(chunks, config, context),
        config=transformer,
        engine=config.engine,
        optim=config.optim,
        context=context,
    )


def _deepspeed_engine(config: RunConfig, context: ParallelContext) -> Engine:
    common: Any = {"engine": config.engine, "optim": config.optim, "context": context, "tokens": _tokens}
    alone = stage_context(context)  # DeepSpeed owns the pipeline: layers see none
    transformer = _transformer_config(config, alone)
    if context.layout.pipeline == 1:
        (chunk,) = build_chunks(config.model, transformer, context)
        return _noted(DeepSpeedEngine(chunk, shards=_filled([chunk], config, context), **common), config)
    pipeline = Pipeline(
        plans=gpt_layers(config.model, transformer, alone),
        spread=BlockLayer,
        inputs=lambda batch: tuple(
            tensor for tensor in (batch.tokens_BS, batch.positions_BS, batch.documents_BS) if tensor is not None
        ),
        outputs=lambda logits, tokens, positions, documents, labels: losses_of(logits, labels, context.groups.tp),
        prepare=lambda layers: _filled(cast("Sequence[Chunk]", layers), config, context),
    )
    return _noted(DeepSpeedPipelineEngine(pipeline, **common), config)


def _noted(engine: DeepSpeedEngine, config: RunConfig) -> DeepSpeedEngine:
    """Leave what DeepSpeed was told in the run directory."""
    if engine.context.rank == 0 and Path(config.run_dir).is_dir():
        write_ds_config(engine.ds_config, Path(config.run_dir))
    return engine


def _transformer_config(config: RunConfig, context: ParallelContext) -> TransformerConfig:
    engine, device = config.engine, context.device
    check_fp8_device(engine.fp8, device)
    return transformer_config(
        config.model,
        context,
        precision=engine.precision,
        recompute=engine.recompute,
        kernels=run_kernels(config, on_cuda=device.type == "cuda"),
        fp8=engine.fp8,
    )


def _filled(
    chunks: Sequence[Chunk], config: RunConfig, context: ParallelContext
) -> list[tuple[Shard, torch.nn.Parameter]]:
    """Give the chunks their initial weights, and torch.compile their layers if it is to have them; their shards."""
    if config.train.init_from is None:
        initialize_parameters(chunks, context, seed=config.seed)
    else:
        load_hf(Path(config.train.init_from), chunks, context)
    if config.engine.compile == "blocks":
        compile_layers(chunks, context.device)
    return list(named_shards(chunks))


def _tokens(batch: MicroBatch) -> torch.Tensor:
    return batch.loss_mask_BS.sum()


def sum_losses(losses_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses that count, their number, both as float64 to report), as Megatron-Core's schedules want it."""
    loss_sum = (losses_BS.float() * mask_BS).sum()
    tokens = mask_BS.sum()
    report = torch.stack((loss_sum.detach().double(), tokens.double()))
    return loss_sum, tokens.to(torch.int), report
