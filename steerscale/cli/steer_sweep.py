"""`steerscale steer sweep`: a recipe over strengths, beside baselines: effect, fluency, relevance."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.cli.sample import add_sampling_arguments, make_directory, sampling_of
from steerscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from steerscale.interp.recipes import OpenRecipe
    from steerscale.interp.sweep import Method, Point
    from steerscale.language_model import LanguageModel


def sweep_parser() -> argparse.ArgumentParser:
    """Of what follows `steerscale steer sweep`."""
    parser = argparse.ArgumentParser(
        prog="steerscale steer sweep",
        description="Go on from prompts with a recipe at several strengths, and with baselines: how much of a concept comes "
        "into the texts, and what that costs (docs/steering.md). A baseline runs if its option is given.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="what is to be changed")
    parser.add_argument("--model", type=Path, metavar="DIR", help="language model (default: the recipe's)")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="texts to go on from, one a line")
    parser.add_argument(
        "--strengths", type=float, nargs="+", required=True, metavar="X", help="factors of the recipe; 0 is added"
    )
    parser.add_argument("--concept", required=True, metavar="REGEX", help="what texts are to show, or to lack")
    parser.add_argument(
        "--token",
        action="append",
        metavar="TEXT",
        help="counts as the concept's next token (default: all that --concept matches)",
    )
    parser.add_argument("--suppress", action="store_true", help="the concept is to be absent")
    parser.add_argument("--instruction", metavar="TEXT", help="prompting: put in front of each prompt, as plain text")
    parser.add_argument(
        "--pair",
        nargs=2,
        metavar=("WITH", "WITHOUT"),
        help="activation addition: a text with the concept and one without",
    )
    parser.add_argument(
        "--contrast",
        type=Path,
        nargs=2,
        metavar=("WITH", "WITHOUT"),
        help="difference of means and a probe: two files of texts, one a line",
    )
    add_sampling_arguments(parser, max_tokens=32, temperature=0.8, top_p=0.95)
    parser.add_argument(
        "--texts", type=int, default=1, metavar="N", help="texts to show of each (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write sweep.json, sweep.md and sweep.png there"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Sweep, print, write."""
    from steerscale.interp.recipes import load_recipe
    from steerscale.interp.sweep import Sweep, concept_tokens, run_sweep
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout

    opened = load_recipe(args.recipe).open(model=args.model)
    prompts = read_lines(args.prompts)
    if args.output is not None:
        make_directory(args.output)
    with initialize(ParallelLayout()) as context:
        lm = load_language_model(opened.model, context, checkpoint=opened.checkpoint)
        tokens = [one_token(lm, text) for text in args.token or []] or concept_tokens(lm, args.concept)
        sweep = Sweep(
            prompts=prompts,
            concept=args.concept,
            strengths=args.strengths,
            tokens=tokens,
            suppress=args.suppress,
            max_tokens=args.max_tokens,
            sampling=sampling_of(args),
        )
        points = run_sweep(
            lm, sweep, _methods(args, lm, opened, prompts), on_point=lambda point: _show(point, args.texts)
        )
    print("\n" + table(points))
    if args.output is not None:
        _write(args, points)


def _methods(args: argparse.Namespace, lm: "LanguageModel", opened: "OpenRecipe", prompts: list[str]) -> "list[Method]":
    from steerscale.interp import sweep_baselines as baselines
    from steerscale.interp.sweep import Method

    hook = baselines.recipe_hook(opened)
    methods = [baselines.recipe_method(lm, opened, name=args.recipe.stem)]
    if args.instruction is not None:
        methods.append(Method(name="prompting", instruction=args.instruction))
    vectors = {}
    if args.pair is not None:
        vectors["activation addition"] = baselines.pair_vector(lm, tuple(args.pair), hook)
    if args.contrast is not None:
        texts = (read_lines(args.contrast[0]), read_lines(args.contrast[1]))
        vectors |= baselines.contrast_vectors(lm, texts, hook, drop_first=opened.spare_first)
    if vectors:
        norm = baselines.change_norm(lm, opened, prompts, hook)
        sign = -1 if args.suppress else 1
        methods += [
            baselines.vector_method(lm, opened, name, sign * vector_M, hook=hook, norm=norm)
            for name, vector_M in vectors.items()
        ]
    return methods


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank. Raises DataError if it cannot be read or has none."""
    try:
        # Not splitlines, which also ends lines at characters that stand within a text.
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    if not any(lines):
        raise DataError(f"{path} holds no text")
    return [line for line in lines if line]


def one_token(lm: "LanguageModel", text: str) -> int:
    """Its id. Raises ConfigError if the text is none or several."""
    tokens = lm.tokenizer.encode(text)
    if len(tokens) != 1:
        pieces = " ".join(lm.tokenizer.piece(token) for token in tokens)
        raise ConfigError(f"{text!r} must be one token of this model, it is {len(tokens)}: {pieces}")
    return tokens[0]


def _show(point: "Point", count: int) -> None:
    print(f"{point.method}, strength {point.strength:g}: combined {point.combined:.3f}")
    for text in point.texts[:count]:
        print("  ..." + text.replace("\n", "\\n"), flush=True)


def table(points: "list[Point]", *, markdown: bool = False) -> str:
    """A line a point."""
    from steerscale.interp.sweep import FIGURES

    rows = [["method", "strength", *FIGURES]]
    for point in points:
        figures = [getattr(point, figure) for figure in FIGURES]
        rows.append([point.method, f"{point.strength:g}", *(f"{figure:.3g}" for figure in figures)])
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _write(args: argparse.Namespace, points: "list[Point]") -> None:
    from steerscale.interp.steering_plot import plot_sweep

    asked = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "run"
    }
    content = {"asked": asked, "points": [point.values() for point in points]}
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    (args.output / "sweep.json").write_text(text + "\n", encoding="utf-8")
    (args.output / "sweep.md").write_text(table(points, markdown=True) + "\n", encoding="utf-8")
    plot_sweep(args.output / "sweep.png", points, title=f"{args.recipe.stem}: {args.concept}")
