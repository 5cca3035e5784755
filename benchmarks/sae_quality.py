"""How well SAEs reconstruct: ours and sae-lens', trained on the same activations in the same order.

    python benchmarks/sae_quality.py --data DIR [--lm DIR] [--vectors 49152] [--k 32] [--lrs 3e-3 6e-3] [--seeds 0 1 2]

The activations are those of `blocks.15.hook_resid_post` of SmolLM2-135M (or of --lm at --hook) on a prepared dataset with a
split "valid", streamed and shuffled once, then given to every side batch by batch; the first positions are left out. Sides:

- ours: `MegatronEngine` with `TopKSAE`, settings of `configs/sae/topk_16x.yaml`.
- sae-lens: its own trainer and initial weights, activations scaled by their mean norm.
- sae-lens-median: the same, but b_dec begins at the geometric median, as ours does. Theirs begins at 0, and is slow to get away
  from there where activations have a large mean.

All train TopK SAEs of the same width, k, batches, steps and window of dead latents, with AuxK, in float32, by Adam (0.9, 0.999)
with the same schedule. The same learning rate does not mean the same to all, so each takes its best one of --lrs, found with
the first seed; every run is printed.

FVU, L0 and dead latents are of held-out text. The seed is that of the initial weights.
The last line is one JSON object: `ratio` is the mean FVU of sae-lens' better side over ours, above 1 where ours is better.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks._common import against, print_environment
from steerscale.activations.config import StreamConfig
from steerscale.activations.stream import build_stream
from steerscale.data.config import DataConfig
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.interp.sae_eval import held_out
from steerscale.optim import OptimConfig, learning_rate
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import REPORTED
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.sae.initial import draw_weights, geometric_median, initialize_from_data
from steerscale.train.sae import Vectors, sae_forward

Features = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""activations [B, d] -> (reconstruction [B, d], which latents are active [B, N])."""
Train = Callable[[float, int], Features]
"""(learning rate, seed) -> what was trained."""
SIDES = ("ours", "sae-lens-median", "sae-lens")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides do."""

    hook: str
    expansion: int
    k: int
    batch: int
    steps: int
    warmup_steps: int
    decay_steps: int
    dead_after: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One training."""

    side: str
    seed: int
    lr: float
    fvu: float
    l0: float
    dead: float
    seconds: float


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="dataset of `steerscale data prepare`, with the model's tokenizer"
    )
    parser.add_argument("--lm", help="run directory or Hugging Face model (default: the tests' SmolLM2-135M)")
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--cache", help="directory that keeps activations between invocations (stream.cache)")
    parser.add_argument("--vectors", type=int, default=49152, help="to train on")
    parser.add_argument("--samples", type=int, default=32, help="held-out sequences")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 6e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    environment = print_environment("megatron-core", "sae-lens")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # other people's, about their own code
    steps = args.vectors // args.batch
    work = Work(
        hook=args.hook,
        expansion=args.expansion,
        k=args.k,
        batch=args.batch,
        steps=steps,
        warmup_steps=max(steps // 20, 1),
        decay_steps=max(steps // 5, 1),
        dead_after=max(args.vectors // 4, args.batch),
    )
    with initialize(ParallelLayout(micro_batch_size=args.batch)) as context:
        batches, test = activations(args, work, context)
        sides: dict[str, Train] = {
            "ours": lambda lr, seed: ours(work, batches, context, lr=lr, seed=seed),
            "sae-lens-median": lambda lr, seed: sae_lens(work, batches, lr=lr, seed=seed, median=True),
            "sae-lens": lambda lr, seed: sae_lens(work, batches, lr=lr, seed=seed, median=False),
        }
        runs = [figures for side in args.sides for figures in best_of(side, sides[side], test, args)]
    chosen = {side: [run for run in runs if run.side == side and run.lr == lr] for side, lr in _best(runs).items()}
    mean = {side: statistics.mean(run.fvu for run in of) for side, of in chosen.items()}
    spread = {side: statistics.stdev([run.fvu for run in of]) if len(of) > 1 else None for side, of in chosen.items()}
    theirs = [mean[side] for side in mean if side != "ours"]
    result = {
        "ratio": round(min(theirs) / mean["ours"], 4) if theirs and "ours" in mean else None,
        "fvu": mean,
        "fvu_stdev": spread,
        "lr": _best(runs),
        "environment": environment,
        "work": asdict(work),
        "runs": [asdict(run) for run in runs],
    }
    print(f"FVU of sae-lens' better side / ours: {against(result['ratio'], 1.0)} (within the spread of the seeds)")
    print(json.dumps(result))


def activations(
    args: argparse.Namespace, work: Work, context: ParallelContext
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Training batches [B, d] and held-out vectors [V, d], float32."""
    from steerscale.testing.smollm2 import smollm2_directory

    lanes, seq_len = 16, 256
    config = StreamConfig(
        lm=args.lm or str(smollm2_directory()),
        precision="bf16",
        seq_len=seq_len,
        drop_first=4,
        lanes=lanes,
        buffer_gib=0.141,
        cache=args.cache,
    )
    data = DataConfig(path=args.data)
    begin = time.monotonic()
    stream = build_stream(config, data=data, hooks=[work.hook], context=context)
    batches = [stream.next(work.batch).activations[work.hook].float() for _ in range(work.steps)]
    text = held_out(config, data, stream.source, samples=args.samples)
    if text is None:
        sys.exit(f"{args.data} has no split 'valid'")
    parts = []
    for batch in text.batches(context):
        (found,) = stream.source.run([batch.tokens_BS])
        parts.append(found[work.hook][text.keeps(batch.tokens_BS)].float())
    stream.close()
    test = torch.cat(parts)
    vectors = len(batches) * work.batch
    print(f"{vectors:,} vectors to train on, {len(test):,} held out, in {time.monotonic() - begin:.0f} s", flush=True)
    return batches, test


def best_of(side: str, train: Train, test: torch.Tensor, args: argparse.Namespace) -> list[Figures]:
    """All learning rates with the first seed, the best one with the others."""
    first, *others = args.seeds
    found = [measure(side, train, test, lr=lr, seed=first) for lr in args.lrs]
    best = min(found, key=lambda one: one.fvu).lr
    return found + [measure(side, train, test, lr=best, seed=seed) for seed in others]


def measure(side: str, train: Train, test: torch.Tensor, *, lr: float, seed: int) -> Figures:
    """Train once; print and return what it gives on held-out vectors."""
    begin = time.monotonic()
    features = train(lr, seed)
    seconds = time.monotonic() - begin
    error, count, ever = 0.0, 0, None
    with torch.no_grad():
        for x in test.split(1024):
            hat, active = features(x)
            error += float((hat - x).double().square().sum())
            count += int(active.sum())
            ever = active.any(0) if ever is None else ever | active.any(0)
    assert ever is not None
    variance = float((test - test.mean(0)).double().square().sum())
    dead = float((~ever).double().mean())
    figures = Figures(
        side=side, seed=seed, lr=lr, fvu=error / variance, l0=count / len(test), dead=dead, seconds=seconds
    )
    print(
        f"{side:<9} seed {seed}  lr {lr:g}  FVU {figures.fvu:.4f}  L0 {figures.l0:.2f}  dead {dead:.3f}  {seconds:.0f} s",
        flush=True,
    )
    return figures


def _best(runs: list[Figures]) -> dict[str, float]:
    first = runs[0].seed
    sides = dict.fromkeys(run.side for run in runs)
    return {
        side: min((run for run in runs if run.side == side and run.seed == first), key=lambda one: one.fvu).lr
        for side in sides
    }


def ours(work: Work, batches: list[torch.Tensor], context: ParallelContext, *, lr: float, seed: int) -> Features:
    """As `python -m launch.train --config-name train_sae` trains on one rank."""
    width = batches[0].shape[1]
    config = SAEConfig(
        hooks=[work.hook], expansion=work.expansion, k=work.k, dead_after=work.dead_after, encoder_scale=0.5
    )
    (spec,) = specs_of(config, {work.hook: width})
    sae = ARCHITECTURES[config.architecture](spec, context)
    draw_weights(sae, seed=seed)
    initialize_from_data(sae, batches[0], batches[0])
    optim = OptimConfig(
        lr=lr,
        min_lr=lr / 10,
        schedule="wsd",
        warmup_steps=work.warmup_steps,
        decay_steps=work.decay_steps,
        weight_decay=0.0,
        beta2=0.999,
    )
    engine = MegatronEngine(
        [sae],
        shards=list(sae.shards()),
        config=sae.config,
        engine=EngineConfig(overlap=False),
        optim=optim,
        context=context,
        num_reported=len(REPORTED),
    )
    for step, x in enumerate(batches):
        sae.before_step(step)
        engine.train_step([Vectors({work.hook: x}, len(x))], sae_forward, lr=learning_rate(optim, step, len(batches)))
        sae.after_update()
    engine.close()
    sae.eval()

    def features(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        selection, values = sae.features(sae.encode(x).pre_BN)
        active = selection.dense(values) > 0
        return sae.decode(selection, values), active

    return features


def sae_lens(work: Work, batches: list[torch.Tensor], *, lr: float, seed: int, median: bool) -> Features:
    """Its own trainer and settings, AuxK included, and its scaling of the activations."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    d_in = batches[0].shape[1]
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=work.expansion * d_in,
            k=work.k,
            device="cpu",
            dtype="float32",
            normalize_activations="expected_average_only_in",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=len(batches) * work.batch,
        train_batch_size_samples=work.batch,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=work.warmup_steps,
        lr_decay_steps=work.decay_steps,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=work.dead_after // work.batch,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(batches))
    # What its trainer would estimate from batches that it then no longer trained on.
    scale = trainer.activation_scaler.scaling_factor = d_in**0.5 / float(batches[0].norm(dim=1).mean())
    if median:
        sae.b_dec.data.copy_(geometric_median(batches[0] * scale))
    trained = trainer.fit()

    def features(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = trained.encode(x)
        encoded = encoded.to_dense() if encoded.is_sparse else encoded
        return trained.decode(encoded), encoded > 0

    return features


if __name__ == "__main__":
    main()
