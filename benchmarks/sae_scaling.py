"""What tensor parallelism costs an SAE and what it saves: bytes sent, memory, steps a second for P = 1, 2, 4, 8 ranks.

    python benchmarks/sae_scaling.py [--ranks 1 2 4 8] [--d 256] [--latents 32768] [--k 32] [--batch 512] [--steps 6]

A TopK SAE trained by `MegatronEngine` on P processes of this machine over gloo. Counted is what the code hands to collectives,
as what one rank sends (ring algorithms): an all-reduce of n bytes 2 n (P-1)/P, an all-to-all n (P-1)/P. Beside it stands the
formula:

- selection: B m (P-1)/P values and B (P-1)/P x 4 bytes of counts, m candidates (`parallel.select.offered_by_rank`); rows that
  have to be decided again come on top, and are not in the formula;
- reconstruction: 2 B d (P-1)/P values; gradients: of weights none, of b_dec 2 d (P-1)/P values (among "other");
- for comparison, data parallelism: 4 N d (P-1)/P values for the gradients of both matrices.

Memory is what a rank's resident memory grew by from before the SAE was built to its highest: weights, gradients, moments and
pre-activations, all cut by P. Ranks share the cores, so steps a second say nothing of GPUs. The last line is one JSON
object; `ratio` is the least of formula over counted bytes, 1 where the code sends what it says.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._common import print_environment
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.select import offered_by_rank
from steerscale.sae.base import REPORTED
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.sae.initial import draw_weights
from steerscale.sae.topk import TopKSAE
from steerscale.train.sae import Vectors, sae_forward

HOOK = "blocks.0.hook_resid_post"
KINDS = ("selection", "reconstruction", "other")


@dataclass(frozen=True)
class Work:
    """One SAE and its batch."""

    d: int
    latents: int
    k: int
    batch: int
    steps: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--latents", type=int, default=32768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    environment = print_environment("megatron-core")
    work = Work(d=args.d, latents=args.latents, k=args.k, batch=args.batch, steps=args.steps)
    results, ratios = {}, []
    print(
        f"{work.d} -> {work.latents:,}, k {work.k}, {work.batch} vectors a step; MB (10^6 bytes) sent by a rank a step"
    )
    print(
        f"{'P':>3} {'selection':>20} {'reconstruction':>20} {'other':>10} {'if DP':>10} {'memory MiB':>11} {'steps/s':>8}"
    )
    for ranks in args.ranks:
        found, formula = measure(work, ranks), formulas(work, ranks)
        results[ranks] = {**found, "formula": formula}
        cells = [f"{found[kind] / 1e6:8.3f} ({formula[kind] / 1e6:8.3f})" for kind in KINDS[:2]]
        print(
            f"{ranks:>3} {cells[0]:>20} {cells[1]:>20} {found['other'] / 1e6:>10.4f} {formula['data_parallel'] / 1e6:>10.2f} "
            f"{found['memory_mib']:>11.1f} {found['steps_per_second']:>8.2f}",
            flush=True,
        )
        ratios += [formula[kind] / found[kind] for kind in KINDS[:2] if found[kind]]
    print("in brackets: by the formula; if DP: what data parallelism over P ranks would send instead")
    least = min(ratios, default=1.0)
    print(f"formula / counted bytes, least: {least:.3f} (1: what is sent is what the formula says)")
    print(json.dumps({"ratio": least, **vars(args), "environment": environment, "by_ranks": results}))


def formulas(work: Work, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in a step; see the module's docstring."""
    share = (ranks - 1) / ranks
    offered = offered_by_rank(work.k, ranks)
    return {
        "selection": work.batch * (offered + 1) * share * 4,
        "reconstruction": 2 * work.batch * work.d * share * 4,
        "data_parallel": 4 * work.latents * work.d * share * 4,
    }


def measure(work: Work, ranks: int) -> dict[str, float]:
    """Train on `ranks` processes: bytes by kind, memory of the fullest rank, speed."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        queue = context.Queue()
        arguments = (work, ranks, f"{directory}/store", queue)
        processes = [context.Process(target=_serve, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        answers = [queue.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    merged = {kind: max(answer[kind] for answer in answers) for kind in (*KINDS, "memory_mib")}
    return {**merged, "steps_per_second": min(answer["steps_per_second"] for answer in answers)}


def _serve(rank: int, work: Work, ranks: int, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    sent: Counter[str] = Counter()
    _count(sent, large=work.batch * work.d)
    with initialize(ParallelLayout(tensor=ranks, micro_batch_size=work.batch)) as context:
        before = _resident_mib()
        (spec,) = specs_of(SAEConfig(hooks=[HOOK], width=work.latents, k=work.k), {HOOK: work.d})
        sae = TopKSAE(spec, context)
        draw_weights(sae, seed=0)
        engine = MegatronEngine(
            [sae],
            shards=list(sae.shards()),
            config=sae.config,
            engine=EngineConfig(distributed_optimizer=False),
            optim=OptimConfig(weight_decay=0.0),
            context=context,
            num_reported=len(REPORTED),
        )
        batch = Vectors({HOOK: torch.randn(work.batch, work.d, generator=torch.Generator().manual_seed(0))}, work.batch)
        for step in range(work.steps + 1):
            if step == 1:  # the first one warms up
                sent.clear()
                begin = time.perf_counter()
            sae.before_step(step)
            assert engine.train_step([batch], sae_forward, lr=1e-4).applied
            sae.after_update()
        seconds = time.perf_counter() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
        figures = {kind: sent[kind] / work.steps for kind in KINDS}
        queue.put({**figures, "memory_mib": memory, "steps_per_second": work.steps / seconds})
        engine.close()
    dist.destroy_process_group()


def _count(sent: Counter[str], *, large: int) -> None:
    """Count what one rank sends by the collectives of the step; reconstructions are the only all-reduces of `large` numbers."""
    all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

    def counted_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = "reconstruction" if tensor.numel() >= large else "other"
        sent[kind] += 2 * _share(kwargs.get("group")) * tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def counted_all_to_all(output: torch.Tensor, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["selection"] += _share(kwargs.get("group")) * input_.numel() * input_.element_size()
        return all_to_all(output, input_, *args, **kwargs)

    replaced: dict[str, Callable] = {"all_reduce": counted_all_reduce, "all_to_all_single": counted_all_to_all}
    for name, function in replaced.items():
        setattr(dist, name, function)


def _share(group: Any) -> float:
    ranks = dist.get_world_size(group)
    return (ranks - 1) / ranks


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
