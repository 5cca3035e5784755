"""The sides of sae_step.py: the same training step by the engine, by functions, by torch alone and by other packages."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Step = Callable[[int, torch.Tensor], float]
"""(number of the step, activations [B, d]) -> loss."""
LR = 2e-4


@dataclass(frozen=True)
class Work:
    """What every side does."""

    d: int
    latents: int = 16384
    k: int = 32
    batch: int = 2048
    device: str = "cpu"


@contextmanager
def _gemm(work: Work, first: torch.Tensor) -> Iterator[Step]:
    weight = torch.randn(work.latents, work.d, device=first.device)
    bias = torch.zeros(work.latents, device=first.device)
    yield lambda number, x: float(F.linear(x, weight, bias)[0, 0])


@contextmanager
def _ours(work: Work, first: torch.Tensor) -> Iterator[Step]:
    from steerscale.engines.config import EngineConfig
    from steerscale.engines.megatron import MegatronEngine
    from steerscale.optim import OptimConfig
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout
    from steerscale.sae.architectures import ARCHITECTURES
    from steerscale.sae.base import REPORTED
    from steerscale.sae.config import SAEConfig, specs_of
    from steerscale.sae.initial import draw_weights, initialize_from_data
    from steerscale.train.sae import Vectors, sae_forward

    hook = "blocks.0.hook_resid_post"
    (spec,) = specs_of(SAEConfig(hooks=[hook], architecture="topk", width=work.latents, k=work.k), {hook: work.d})
    with initialize(ParallelLayout(micro_batch_size=work.batch)) as context:
        sae = ARCHITECTURES["topk"](spec, context)
        draw_weights(sae, seed=0)
        initialize_from_data(sae, first, first)
        engine = MegatronEngine(
            [sae],
            shards=list(sae.shards()),
            config=sae.config,
            engine=EngineConfig(overlap=False, distributed_optimizer=False),  # as train/sae.py has it for one replica
            optim=OptimConfig(lr=LR, weight_decay=0.0),
            context=context,
            num_reported=len(REPORTED),
        )

        def step(number: int, x: torch.Tensor) -> float:
            sae.before_step(number)
            result = engine.train_step([Vectors({hook: x}, len(x))], sae_forward, lr=LR)
            sae.after_update()
            return result.totals.loss

        yield step


@contextmanager
def _functions(work: Work, first: torch.Tensor) -> Iterator[Step]:
    from steerscale.parallel.select import topk_across
    from steerscale.sae.sparse import decode, pre_activations, selected_pre_activations

    W_enc, W_dec, b_enc, b_dec = _parameters(work, first)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    for weight in (W_enc, W_dec):
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    adam = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    unused = torch.zeros(work.latents, device=first.device)
    buffer = torch.empty(work.batch, work.latents, device=first.device)

    def step(number: int, x: torch.Tensor) -> float:
        W_enc.main_grad.zero_()
        W_dec.main_grad.zero_()
        centered = x - b_dec
        pre = pre_activations(centered, W_enc, b_enc, out=buffer)
        selection = topk_across(pre, work.k)
        values = selected_pre_activations(
            pre, selection, x_BD=centered, W_enc_ND=W_enc, b_enc_N=b_enc, into_main_grad=True
        ).relu()
        x_hat = decode(values, selection, W_dec, project=True, into_main_grad=True) + b_dec
        loss = (x_hat - x).square().sum() / len(x)
        loss.backward()
        for weight in (W_enc, W_dec):
            weight.grad = weight.main_grad
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            unused.add_(len(x))
            unused[selection.latents] = 0
        return float(loss)

    yield step


@contextmanager
def _torch(work: Work, first: torch.Tensor) -> Iterator[Step]:
    W_enc, W_dec, b_enc, b_dec = _parameters(work, first)
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR, fused=True)
    unused = torch.zeros(work.latents, device=first.device)

    @torch.no_grad()
    def step(number: int, x: torch.Tensor) -> float:
        centered = x - b_dec
        pre = torch.addmm(b_enc, centered, W_enc.t())
        values, latents = pre.topk(work.k, dim=1, sorted=False)
        values.relu_()
        error = F.embedding_bag(latents, W_dec, per_sample_weights=values, mode="sum") + b_dec - x
        d_out = error * (2 / len(x))
        d_values = torch.empty_like(values)
        for begin in range(0, len(x), 256):
            rows = slice(begin, begin + 256)
            d_values[rows] = torch.bmm(W_dec[latents[rows]], d_out[rows].unsqueeze(2)).squeeze(2)
        d_values.mul_(values > 0)
        W_dec.grad = _transposed_product(latents, values, d_out, work.latents)
        W_enc.grad = _transposed_product(latents, d_values, centered, work.latents)
        b_enc.grad = torch.zeros_like(b_enc).index_add_(0, latents.reshape(-1), d_values.reshape(-1))
        b_dec.grad = d_out.sum(0) - b_enc.grad @ W_enc
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        adam.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        unused.add_(len(x))
        unused[latents.reshape(-1)] = 0
        return float(error.square().sum() / len(x))

    yield step


def _transposed_product(latents: torch.Tensor, values: torch.Tensor, y: torch.Tensor, count: int) -> torch.Tensor:
    flat = latents.reshape(-1)
    order = flat.argsort()
    bounds = F.pad(torch.bincount(flat, minlength=count).cumsum(0), (1, 0))
    sparse = torch.sparse_csr_tensor(bounds, order // latents.shape[1], values.reshape(-1)[order], (count, len(y)))
    return sparse @ y


def _parameters(work: Work, first: torch.Tensor) -> list[torch.nn.Parameter]:
    """W_enc and W_dec, equal and of unit rows; b_enc; b_dec at the mean of the first batch."""
    rows = F.normalize(torch.randn(work.latents, work.d, device=first.device), dim=1)
    initial = [rows, rows.clone(), torch.zeros(work.latents, device=first.device), first.mean(0)]
    return [torch.nn.Parameter(tensor) for tensor in initial]


@contextmanager
def _sparsify(work: Work, first: torch.Tensor) -> Iterator[Step]:
    if first.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = (
            "1"  # or it launches Triton kernels on the CPU, where Triton is installed
        )
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(work.d, SparseCoderConfig(num_latents=work.latents, k=work.k), device=str(first.device))
    coder.b_dec.data = first.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)  # as their trainer makes it
    unused = torch.zeros(work.latents, dtype=torch.long, device=first.device)

    def step(number: int, x: torch.Tensor) -> float:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=None)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        unused.add_(len(x))
        unused[out.latent_indices.flatten()] = 0
        return float(out.fvu)

    yield step


@contextmanager
def _sae_lens(work: Work, first: torch.Tensor) -> Iterator[Step]:
    os.environ.setdefault("WANDB_MODE", "disabled")
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=work.d, d_sae=work.latents, k=work.k, device=str(first.device), dtype="float32")
    )
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device=str(first.device),
        autocast=False,
        lr=LR,
        lr_end=LR,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        train_batch_size_samples=work.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        n_batches_for_norm_estimate=1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter([]))

    def step(number: int, x: torch.Tensor) -> float:
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return float(out.loss)

    yield step


SIDES: dict[str, Callable[[Work, torch.Tensor], Any]] = {
    "gemm": _gemm,
    "ours": _ours,
    "functions": _functions,
    "torch": _torch,
    "eai-sparsify": _sparsify,
    "sae-lens": _sae_lens,
}
_PACKAGES = {"eai-sparsify": "sparsify", "sae-lens": "sae_lens"}


def installed(side: str) -> bool:
    """Whether the package of this side is here."""
    return side not in _PACKAGES or importlib.util.find_spec(_PACKAGES[side]) is not None
