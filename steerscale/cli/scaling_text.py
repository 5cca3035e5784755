"""Answers of `steerscale scaling` as text."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerscale.errors import SteerscaleError
from steerscale.planning.scaling_fit import NAMES, Fit
from steerscale.planning.scaling_frontier import Frontier
from steerscale.rundir import write_text


def write_file(path: Path, text: str) -> None:
    """Write a small file at once. Raises SteerscaleError if it cannot be."""
    try:
        write_text(path, text)
    except OSError as error:
        raise SteerscaleError(f"{path} cannot be written: {error}") from error


def amount(value: float) -> str:
    """A count as people say it: 13.9B, 278B, 1.33T."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= scale * 0.9995:
            return f"{value / scale:.3g}{unit}" if value < 999.5 * scale else f"{value / scale:,.0f}{unit}"
    return f"{value:,.0f}"


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Rows in columns, the first row their titles; columns stand to the right but for those of `left`."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def format_plan(answer: dict[str, Any], args: argparse.Namespace) -> str:
    """What `steerscale scaling plan` prints."""
    budget, spread = answer["budget"], answer["spread"]
    lines = [
        f"budget     {budget['gpu_hours']:,.0f} GPU hours at {budget['tflops']:.4g} TFLOP/s ({budget['mfu']:.1%} of "
        f"{budget['peak_tflops']:g}) = {budget['flops']:.4g} FLOPs"
    ]
    if answer["days"] is not None:
        lines.append(f"time       {answer['days']:,.1f} days on {args.gpus:,} GPUs")
    lines += [f"assumed    {sentence}" for sentence in answer["assumptions"]]
    rows = [("law", "N", "without emb.", "tokens", "D/N", "6ND/C", "own loss", "loss", "")]
    for row in answer["laws"]:
        own = "-" if row["own_loss"] is None else f"{row['own_loss']:.3f}"
        sizes = (amount(row["parameters"]), amount(row["non_embedding"]), amount(row["tokens"]))
        shares = (f"{row['tokens_per_parameter']:.3g}", f"{row['flops_over_budget']:.2f}")
        rows.append((row["law"], *sizes, *shares, own, f"{row['loss']:.3f}", row["note"]))
    lines += [
        "",
        *table(rows, left=(0, 8)),
        "own loss: by the law itself, on its own text; loss: by the refit, to compare rows",
    ]
    low, high = ([amount(pair[side]) for pair in (spread["parameters"], spread["tokens"])] for side in (0, 1))
    lines.append(f"spread     {low[0]} to {high[0]} parameters, {low[1]} to {high[1]} tokens, Kaplan apart")
    rows = [("smaller, longer", "tokens", "D/N", "loss", "more than best", "budget for the best loss")]
    for one in answer["over_training"]:
        factor = "never" if one["budget_factor"] is None else f"x {one['budget_factor']:.2f}"
        sizes = (amount(one["parameters"]), amount(one["tokens"]), f"{one['tokens_per_parameter']:.0f}")
        rows.append((*sizes, f"{one['loss']:.3f}", f"+{one['extra_loss']:.4f}", factor))
    lines += ["", *table(rows)]
    if answer["inference"] is not None:
        best = answer["inference"]
        lines.append(
            f"with use   {amount(best['parameters'])} on {amount(best['tokens'])} tokens is best if the budget also pays for "
            f"{amount(args.inference_tokens)} tokens of inference (2N FLOPs each)"
        )
    for end in answer["tokens"] or ():
        lines.append(f"all on     {amount(end['tokens'])} tokens: {amount(end['parameters'])} parameters")
    return "\n".join([*lines, "", *_model_lines(answer, args), "", answer["preset"].rstrip()])


def _model_lines(answer: dict[str, Any], args: argparse.Namespace) -> list[str]:
    chosen, model = answer["chosen"], answer["model"]
    hours = sorted({round(hours) for hours in chosen["gpu_hours_for_tokens"]})
    ends = "" if args.tokens is None else f" on {amount(args.tokens[0])} to {amount(args.tokens[1])} tokens"
    spoken = " to ".join(f"{value:,}" for value in hours)
    return [
        f"model      {amount(chosen['parameters'])} parameters on {amount(chosen['tokens'])} tokens; "
        f"{spoken} GPU hours{ends} by 6 N D",
        f"shape      {answer['model_parameters'] / 1e9:,.4g} B: {model['num_layers']} layers of width {model['d_model']:,}, "
        f"{model['num_heads']} heads, divides for TP{args.tp} PP{args.pp}; exact FLOPs with attention and logits: "
        f"{answer['model_gpu_hours']:,.0f} GPU hours",
        "preset     save it as configs/model/NAME.yaml (-o), then python -m launch.train model=NAME ..."
        if args.output is None
        else f"preset     {args.output}",
    ]


def format_fit(
    fit: Fit, frontiers: dict[str, Frontier | str], held_out: Sequence[dict[str, Any]], warnings: Sequence[str]
) -> str:
    """What `steerscale scaling fit` prints; a frontier that could not be fitted is the reason why."""
    rows = [("L = E + A/N^alpha + B/D^beta", "", f"{fit.level:.0%} interval")]
    for name in (*NAMES, "exponent"):
        title = "a = beta/(alpha+beta)" if name == "exponent" else name
        rows.append((title, f"{getattr(fit.law, name):.5g}", _spoken(fit.interval(name))))
    lines = [
        *table(rows),
        f"{fit.points} points, rms of log loss {fit.rms:.2%}, objective {fit.objective:.5g}; {fit.agreeing} of {fit.starts} "
        "starts ended there",
        "",
    ]
    rows = [("N ~ C^a by", "a", f"{fit.level:.0%} interval", "from")]
    rows.append(
        ("parametric fit", f"{fit.law.exponent:.3f}", _spoken(fit.interval("exponent")), f"{fit.points} points")
    )
    reasons = []
    for name, found in frontiers.items():
        if isinstance(found, str):
            reasons.append(f"{name}: not fitted: {found}")
        else:
            rows.append((name, f"{found.law.exponent:.3f}", _spoken(found.interval), f"{len(found.best)} budgets"))
    lines += [*table(rows), *reasons]
    if held_out:
        rows = [("held out", "N", "tokens", "measured", "predicted", "error", f"{fit.level:.0%} interval", "")]
        for one in held_out:
            figures = (f"{one['loss']:.4f}", f"{one['predicted']:.4f}", f"{one['predicted'] / one['loss'] - 1:+.2%}")
            interval = one["interval"]
            inside = "" if interval is None else "inside" if interval[0] <= one["loss"] <= interval[1] else "outside"
            sizes = (one["name"], amount(one["parameters"]), amount(one["tokens"]))
            rows.append((*sizes, *figures, _spoken(interval), inside))
        lines += ["", *table(rows)]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in warnings)])


def _spoken(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
