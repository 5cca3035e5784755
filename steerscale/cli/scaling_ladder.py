"""`steerscale scaling ladder`: sizes x tokens -> a sweep file of small models, each with learning rate and batch by rule."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.planning.scaling_ladder import Rung

LIKE = "demo"


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "ladder",
        help="a sweep of small models to fit a law to",
        description="Write a sweep file of every size on every number of tokens, and one larger model to predict, with "
        "learning rate, batch and warm-up by published rules (docs/scaling_laws.md). Train with `python -m launch.train -m "
        "sweep=FILE`, fit with `steerscale scaling fit RUNS --hold-out 1`.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DATASET", help="directory of `steerscale data prepare`")
    add("--sizes", type=float, nargs="+", required=True, metavar="N", help="parameters, embeddings included: 3 or more")
    add("--tokens", type=float, nargs="+", required=True, metavar="D", help="training tokens: 3 numbers or more")
    add("--hold-out", type=_pair, metavar="N,D", help="a larger run, trained to test the prediction (default: none)")
    add("--like", default=LIKE, metavar="SIZE|FILE", help="model whose blocks they take over (default: %(default)s)")
    add("--seq-len", type=int, metavar="N", help="tokens of a sequence (default: that of --like)")
    add("--micro-batch-size", type=int, default=4, metavar="N", help="sequences at a time (default: %(default)s)")
    add("--data-parallel", type=int, default=1, metavar="N", help="ranks that share each batch (default: %(default)s)")
    add("--largest-lr", type=float, default=2**-7, metavar="X", help="cap of the rule (default: %(default)s)")
    add("--seed", type=int, default=1234, metavar="N", help="of weights and order of samples (default: %(default)s)")
    add("--tflops", type=float, metavar="X", help="model TFLOP/s of all ranks together, to know the hours")
    add("--hours", type=float, metavar="H", help="refuse a ladder that takes longer; needs --tflops")
    add("--json", action="store_true", help="print one JSON object")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the sweep file, ending in .yaml")
    parser.set_defaults(run=run)


def _pair(text: str) -> tuple[float, float]:
    try:
        parameters, tokens = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected parameters,tokens like 2e6,4e6, got {text!r}") from None
    return parameters, tokens


def run(args: argparse.Namespace) -> None:
    """Write the sweep file and print what is in it."""
    from steerscale.cli.plan import load_model
    from steerscale.cli.scaling_text import write_file
    from steerscale.data.manifest import inspect_dataset
    from steerscale.planning.scaling_ladder import check_tokens, held_out_rung, ladder

    _check(args)
    manifest = inspect_dataset(args.data)
    vocab_size = manifest.tokenizer.vocab_size
    like = load_model(args.like, assumptions=[], seq_len=args.seq_len, vocab_size=vocab_size, option="--like")
    for split in ("train", "valid"):
        manifest.require_split(split, seq_len=like.seq_len, path=args.data)
    multiple = args.micro_batch_size * args.data_parallel
    rungs = ladder(args.sizes, args.tokens, like=like, multiple=multiple, largest_lr=args.largest_lr)
    if args.hold_out is not None:
        rungs.append(held_out_rung(rungs, *args.hold_out, like=like, multiple=multiple, largest_lr=args.largest_lr))
    warnings = check_tokens(rungs, manifest.splits["train"].tokens)
    flops = sum(rung.flops for rung in rungs)
    hours = None if args.tflops is None else flops / args.tflops / 3600e12
    if hours is not None and args.hours is not None and hours > args.hours:
        raise ConfigError(
            f"the ladder's {flops:.3g} FLOPs take {hours:.3g} hours at --tflops {args.tflops:g}, more than --hours "
            f"{args.hours:g}: take fewer or smaller --sizes, or fewer --tokens"
        )
    write_file(args.output, _sweep_file(args, rungs))
    rows = [_row(rung) for rung in rungs]
    if args.json:
        answer = {"rungs": rows, "flops": flops, "hours": hours, "file": str(args.output), "warnings": warnings}
        print(json.dumps(answer, indent=1))
        return
    _print(args, rows, flops, hours, warnings)


def _check(args: argparse.Namespace) -> None:
    if args.output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {args.output} must end in .yaml, as sweep=FILE asks for")
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no directory {args.output.parent}")
    for option in ("micro_batch_size", "data_parallel"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    for option in ("tflops", "hours", "largest_lr"):
        value = getattr(args, option)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{option.replace('_', '-')} must be a positive number, got {value:g}")
    if args.hours is not None and args.tflops is None:
        raise ConfigError("--hours needs --tflops, the speed that makes FLOPs of hours: measure a short run")


def _sweep_file(args: argparse.Namespace, rungs: "list[Rung]") -> str:
    """The text of the sweep file: what all runs share, then each run's own keys."""
    import yaml

    from steerscale.planning.architecture import preset_yaml

    own = set(rungs[0].overrides())
    shape = yaml.safe_load(preset_yaml(rungs[0].model, comment=""))
    shared = {
        "name": args.output.stem,
        "data.path": str(args.data),
        "seed": args.seed,
        **{f"model.{key}": value for key, value in shape.items() if f"model.{key}" not in own},
        "parallel.micro_batch_size": args.micro_batch_size,
        "parallel.data": args.data_parallel,
        "optim.schedule": "cosine",
        "train.eval_interval": 0,
        "checkpoint.at_end": False,
    }
    points = {rung.name: rung.overrides() for rung in rungs}
    return (
        "# Written by `steerscale scaling ladder`; the rules behind its numbers: docs/scaling_laws.md.\n"
        f"# python -m launch.train -m sweep={args.output}\n"
        f"{yaml.safe_dump(shared, sort_keys=False)}sweep.points:\n"
        + "".join(
            f"  {name}: {yaml.safe_dump(point, default_flow_style=True, sort_keys=False, width=1000)}"
            for name, point in points.items()
        )
    )


def _row(rung: "Rung") -> dict[str, Any]:
    return {
        "name": rung.name,
        "parameters": rung.parameters,
        "non_embedding": rung.model.num_parameters(embeddings=False),
        "tokens": rung.tokens,
        "num_layers": rung.model.num_layers,
        "d_model": rung.model.d_model,
        "num_heads": rung.model.num_heads,
        "batch": rung.batch,
        "steps": rung.steps,
        "warmup_steps": rung.warmup_steps,
        "lr": rung.lr,
        "flops": rung.flops,
        "held_out": rung.held_out,
    }


def _print(
    args: argparse.Namespace, rows: list[dict[str, Any]], flops: float, hours: float | None, warnings: list[str]
) -> None:
    from steerscale.cli.scaling_text import amount, table

    titles = (
        "run",
        "N",
        "without emb.",
        "tokens",
        "D/N",
        "layers",
        "width",
        "batch",
        "steps",
        "warm-up",
        "lr",
        "FLOPs",
    )
    cells = [
        (
            row["name"],
            *(amount(row["parameters"]), amount(row["non_embedding"]), amount(row["tokens"])),
            f"{row['tokens'] / row['parameters']:.3g}",
            *(str(row[key]) for key in ("num_layers", "d_model", "batch", "steps", "warmup_steps")),
            *(f"{row['lr']:.3g}", f"{row['flops']:.3g}"),
        )
        for row in rows
    ]
    print("\n".join(table([titles, *cells])))
    spoken = "" if hours is None else f", {hours:.3g} hours at {args.tflops:g} TFLOP/s"
    print(f"{len(rows)} runs, {flops:.3g} FLOPs{spoken}")
    for sentence in warnings:
        print(f"warning: {sentence}")
    hold_out = " --hold-out 1" if args.hold_out is not None else ""
    print(
        f"{args.output}: python -m launch.train -m sweep={args.output}; then steerscale scaling fit runs/{args.output.stem}"
        f"{hold_out}"
    )
