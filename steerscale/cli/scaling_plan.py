"""`steerscale scaling plan`: a budget of GPU hours -> model sizes by every law, and one of them ready to train."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.config import to_mapping
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.models.config import ModelConfig
    from steerscale.planning.scaling_laws import Optimum
    from steerscale.planning.scaling_plan import Budget

LIKE = "6.7b"


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="the best model for a budget of GPU hours",
        description="Model size and tokens for a budget under Kaplan's, Chinchilla's and later laws, what smaller models cost, "
        "and a model of the reconciled law's size as a file for configs/model. The formulas: docs/scaling_laws.md.",
    )
    add = parser.add_argument
    add("--gpu-hours", type=float, required=True, metavar="H", help="GPUs times hours")
    add("--gpu", metavar="NAME", help="a100, h100, h200, ...")
    add("--peak-tflops", type=float, metavar="X", help="dense bf16 peak of a GPU that has no name here, 1e12 FLOP/s")
    add("--mfu", type=float, metavar="X", help="model FLOPs utilisation, 0.45 for 45 %%")
    add("--from-runs", type=Path, nargs="+", metavar="RUN", help="take the MFU of the fastest of these runs")
    add(
        "--tokens",
        type=token_range,
        metavar="A..B",
        help="tokens there are to train on, like 250e9..300e9, or one number",
    )
    add("--parameters", type=float, metavar="N", help="plan this size, not the best one")
    add("--gpus", type=int, metavar="N", help="GPUs at a time, to know the days")
    add(
        "--inference-tokens",
        type=float,
        metavar="N",
        help="tokens the model will read and write in use, on this budget",
    )
    add(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel degree that must divide it (default: %(default)s)",
    )
    add("--pp", type=int, default=1, metavar="N", help="pipeline stages that must divide it (default: %(default)s)")
    add("--like", default=LIKE, metavar="SIZE|FILE", help="model whose blocks it takes over (default: %(default)s)")
    add("--vocab-size", type=int, metavar="N", help="tokens of the vocabulary (default: as steerscale plan assumes)")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", type=Path, metavar="FILE", help="write a picture: loss by size at this budget")
    add("-o", "--output", type=Path, metavar="FILE", help="write the model there, e.g. configs/model/mine.yaml")
    parser.set_defaults(run=run)


def token_range(text: str) -> tuple[float, float]:
    """`A..B`, or one number for both."""
    parts = text.split("..")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"expected a range like 250e9..300e9, got {text!r}")
    return values[0], values[-1]


def run(args: argparse.Namespace) -> None:
    """Print the plan; write preset and picture if asked to."""
    from steerscale.cli.scaling_text import write_file
    from steerscale.planning.architecture import find_architecture, preset_yaml
    from steerscale.planning.flops import model_flops_per_token
    from steerscale.planning.scaling_plan import inference_optimum, law_rows, over_training, spread
    from steerscale.planning.scaling_plots import check_picture, plot_plan

    if args.plot is not None:
        check_picture(args.plot)
    if args.output is not None and not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no directory {args.output.parent}")
    assumptions: list[str] = []
    budget = _budget(args, assumptions)
    chosen = _chosen(args, budget, assumptions)
    like = _like(args, assumptions)
    model = find_architecture(chosen.parameters, like=like, tensor=args.tp, pipeline=args.pp)
    rows = law_rows(budget.flops)
    exact = model_flops_per_token(model) * chosen.tokens
    comment = (
        f"{model.num_parameters() / 1e9:.4g} B parameters with {model.tokens} tokens, for {chosen.tokens:.4g} training tokens: "
        f"steerscale scaling plan, {args.gpu_hours:g} GPU hours at {budget.tflops:.4g} TFLOP/s."
    )
    preset = preset_yaml(model, comment=comment)
    answer: dict[str, Any] = {
        "budget": {**vars(budget), "tflops": budget.tflops, "flops": budget.flops},
        "days": None if args.gpus is None else budget.days(args.gpus),
        "laws": [{**vars(row), "tokens_per_parameter": row.tokens_per_parameter} for row in rows],
        "spread": spread(rows),
        "over_training": [
            {**vars(one), "tokens_per_parameter": one.tokens_per_parameter} for one in over_training(budget.flops)
        ],
        "tokens": None
        if args.tokens is None
        else [{"tokens": tokens, "parameters": budget.flops / 6 / tokens} for tokens in args.tokens],
        "inference": None
        if args.inference_tokens is None
        else dataclasses.asdict(inference_optimum(budget.flops, args.inference_tokens)),
        "chosen": {
            **vars(chosen),
            "gpu_hours": budget.hours_for(chosen.flops),
            "gpu_hours_for_tokens": [
                budget.hours_for(6 * chosen.parameters * tokens) for tokens in args.tokens or (chosen.tokens,)
            ],
        },
        "model": to_mapping(model),
        "model_parameters": model.num_parameters(),
        "model_flops": exact,
        "model_gpu_hours": budget.hours_for(exact),
        "preset": preset,
        "assumptions": assumptions,
    }
    if args.plot is not None:
        plot_plan(args.plot, budget.flops, rows, chosen)
    if args.output is not None:
        write_file(args.output, preset)
    if args.json:
        print(json.dumps(answer, indent=1))
        return
    from steerscale.cli.scaling_text import format_plan

    print(format_plan(answer, args))


def _budget(args: argparse.Namespace, assumptions: list[str]) -> "Budget":
    from steerscale.planning.hardware import DEVICES
    from steerscale.planning.machine import device_key
    from steerscale.planning.scaling_plan import Budget

    if (args.gpu is None) == (args.peak_tflops is None):
        raise ConfigError("which GPU? give one of --gpu NAME and --peak-tflops X")
    if (args.mfu is None) == (args.from_runs is None):
        raise ConfigError("which utilisation? give one of --mfu X and --from-runs RUN; 0.3 to 0.5 is usual on A100s")
    peak = args.peak_tflops if args.gpu is None else DEVICES[device_key(args.gpu)].bf16_tflops
    mfu = args.mfu
    if args.from_runs is not None:
        from steerscale.cli.scaling_runs import measured_mfu

        mfu, notes = measured_mfu(args.from_runs, peak_tflops=peak)
        assumptions += notes
    return Budget(gpu_hours=args.gpu_hours, peak_tflops=peak, mfu=mfu)


def _chosen(args: argparse.Namespace, budget: "Budget", assumptions: list[str]) -> "Optimum":
    """What the preset is for: the best size, that of --tokens, or the user's own."""
    from steerscale.planning.scaling_laws import Optimum, tokens_for
    from steerscale.planning.scaling_plan import SMALLEST_PARAMETERS, pick

    chosen = pick(budget.flops, args.tokens)
    if args.parameters is None:
        return chosen
    if not (math.isfinite(args.parameters) and args.parameters >= SMALLEST_PARAMETERS):
        raise ConfigError(
            f"--parameters must be at least {SMALLEST_PARAMETERS:g}, got {args.parameters:g}: the laws know no smaller model"
        )
    tokens = tokens_for(budget.flops, args.parameters)
    if args.tokens is not None:
        tokens = min(max(tokens, args.tokens[0]), args.tokens[1])
    chosen = Optimum(parameters=args.parameters, tokens=tokens)
    if chosen.flops > budget.flops * 1.0001:
        raise ConfigError(
            f"{args.parameters:g} parameters on {tokens:g} tokens take {budget.hours_for(chosen.flops):,.0f} GPU hours, "
            f"more than --gpu-hours {args.gpu_hours:g}: lower --parameters or --tokens"
        )
    if chosen.flops < budget.flops * 0.9999:
        assumptions.append(f"that {budget.hours_for(budget.flops - chosen.flops):,.0f} GPU hours may be left over")
    return chosen


def _like(args: argparse.Namespace, assumptions: list[str]) -> "ModelConfig":
    from steerscale.cli.plan import load_model

    return load_model(args.like, vocab_size=args.vocab_size, assumptions=assumptions, option="--like")
