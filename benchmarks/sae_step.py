"""A training step of a TopK SAE on given activations: the engine, bare functions, and other packages, on the same work.

    python benchmarks/sae_step.py [--widths 768 512] [--rounds 9] [--threads 2] [--quick]

Sides, each in a process of its own, steps alternating; the first two rounds are warm-up and figures are medians:

- gemm: the encoder's matrix product with its bias alone, B x d by d x N: what any training step contains.
- ours: `MegatronEngine` with `TopKSAE`, as `python -m launch.train` runs it on one rank.
- functions: `steerscale.sae.sparse` and torch.optim.AdamW in a plain loop.
- torch: the same written with torch operations only (topk, embedding_bag, sparse CSR products), no clipping.
- eai-sparsify, sae-lens: their own trainers' steps, where installed (`requirements-peers.txt`).

A step: forward, loss, backward, and all duties of a step: decoder at unit norm with its gradient projected, clipping, Adam
(fused where the side allows it), dead-latent counters. All float32, k latents of N, synthetic activations made of sparse
features.
The last line is one JSON object with tokens per second and the ratios to the others.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

Step = Callable[[int, torch.Tensor], float]
"""(number of the step, activations [B, d]) -> loss."""
LR = 2e-4
WARM_UP = 2
NUM_BATCHES = 4


@dataclass(frozen=True)
class Work:
    """What every side does."""

    d: int
    latents: int = 16384
    k: int = 32
    batch: int = 2048


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 512])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=[side for side in SIDES if _installed(side)])
    parser.add_argument("--quick", action="store_true", help="a tiny SAE and two rounds: does it run?")
    args = parser.parse_args()
    works = [Work(d=64, latents=512, k=8, batch=128)] if args.quick else [Work(d=d) for d in args.widths]
    sides = list(dict.fromkeys(["gemm", "ours", *args.sides]))
    rounds = 2 if args.quick else args.rounds
    results = {f"d={work.d}": measure(work, sides, rounds=rounds, threads=args.threads) for work in works}
    # Against another package, else against torch alone; without either there is nothing to compare with.
    peers = ("eai-sparsify", "torch")
    ratios = [next((r["speedup"][p] for p in peers if p in r["speedup"]), None) for r in results.values()]
    print(
        json.dumps(
            {
                "ratio": None if None in ratios else min(ratios),
                "rounds": rounds,
                "threads": args.threads,
                "torch": torch.__version__,
                "widths": results,
            }
        )
    )


def measure(work: Work, sides: list[str], *, rounds: int, threads: int) -> dict[str, Any]:
    """Alternate steps of all sides; print a table; return the figures."""
    workers = {side: _start(side, work, threads) for side in sides}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    try:
        for number in range(WARM_UP + rounds):
            # Taking turns at going first: nobody is always the one after a cold cache.
            for side in sides if number % 2 else reversed(sides):
                answer = _ask(workers[side][1])
                if number >= WARM_UP:
                    times[side].append(answer)
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join()
    wall = {side: statistics.median(seconds for seconds, _ in times[side]) for side in sides}
    cpu = {side: statistics.median(seconds for _, seconds in times[side]) for side in sides}
    best = {side: min(seconds for seconds, _ in times[side]) for side in sides}
    figures = {
        "seconds_per_step": {side: round(wall[side], 4) for side in sides},
        "best_seconds_per_step": {side: round(best[side], 4) for side in sides},
        "cpu_seconds_per_step": {side: round(cpu[side], 4) for side in sides},
        "tokens_per_second": {side: round(work.batch / wall[side], 1) for side in sides},
        "ours_over_gemm": round(wall["ours"] / wall["gemm"], 3),
        "ours_over_gemm_best": round(best["ours"] / best["gemm"], 3),
        "speedup": {side: round(wall[side] / wall["ours"], 3) for side in sides if side not in ("gemm", "ours")},
        "cpu_speedup": {side: round(cpu[side] / cpu["ours"], 3) for side in sides if side not in ("gemm", "ours")},
    }
    print(f"d={work.d}, N={work.latents}, k={work.k}, B={work.batch}, float32, {threads} threads")
    print(f"  {'':<14} {'s/step':>8} {'best':>8} {'CPU s':>8} {'tokens/s':>9} {'/ gemm':>7} {'ours is':>8}")
    for side in sides:
        row = f"{wall[side]:8.3f} {best[side]:8.3f} {cpu[side]:8.3f} {work.batch / wall[side]:9,.0f}"
        print(f"  {side:<14} {row} {wall[side] / wall['gemm']:7.2f} {wall[side] / wall['ours']:7.2f}x")
    sys.stdout.flush()
    return figures


def _start(side: str, work: Work, threads: int) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side, work, threads), daemon=True)
    process.start()
    theirs.close()
    _ask(ours)  # built, and a first step done, before anything is measured
    return process, ours


def _ask(connection: Connection) -> tuple[float, float]:
    connection.send("step")
    return connection.recv()


def _serve(connection: Connection, side: str, work: Work, threads: int) -> None:
    """The process of one side: a step on command."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    batches = _batches(work)
    with SIDES[side](work, batches[0]) as step:
        number = 0
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            wall, cpu = time.perf_counter(), time.process_time()
            step(number, batches[number % NUM_BATCHES])
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))
            number += 1


def _batches(work: Work) -> list[torch.Tensor]:
    """Activations of mean norm sqrt(d): 32 of 4d random directions each, and a little noise."""
    directions = F.normalize(torch.randn(4 * work.d, work.d), dim=1)
    batches = []
    for _ in range(NUM_BATCHES):
        active = torch.randint(0, 4 * work.d, (work.batch, 32))
        weights = torch.rand(work.batch, 32) + 0.5
        x = F.embedding_bag(active, directions, per_sample_weights=weights, mode="sum")
        x = x + 0.05 * torch.randn(x.shape)
        batches.append(x * (work.d**0.5 / x.norm(dim=1).mean()))
    return batches


@contextmanager
def _gemm(work: Work, first: torch.Tensor) -> Iterator[Step]:
    weight, bias = torch.randn(work.latents, work.d), torch.zeros(work.latents)
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
    unused = torch.zeros(work.latents)
    buffer = torch.empty(work.batch, work.latents)

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
    unused = torch.zeros(work.latents)

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
    rows = F.normalize(torch.randn(work.latents, work.d), dim=1)
    initial = [rows, rows.clone(), torch.zeros(work.latents), first.mean(0)]
    return [torch.nn.Parameter(tensor) for tensor in initial]


@contextmanager
def _sparsify(work: Work, first: torch.Tensor) -> Iterator[Step]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # or it launches Triton kernels on the CPU, where Triton is installed
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(work.d, SparseCoderConfig(num_latents=work.latents, k=work.k), device="cpu")
    coder.b_dec.data = first.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)  # as their trainer makes it
    unused = torch.zeros(work.latents, dtype=torch.long)

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
        TopKTrainingSAEConfig(d_in=work.d, d_sae=work.latents, k=work.k, device="cpu", dtype="float32")
    )
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device="cpu",
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


def _installed(side: str) -> bool:
    return side not in _PACKAGES or importlib.util.find_spec(_PACKAGES[side]) is not None


if __name__ == "__main__":
    main()
