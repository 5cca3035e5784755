"""`steerscale sae find`: latents that are about something, by text, labels, a target token or a direction."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sae_source import add_source_arguments, read_source
from steerscale.cli.sample import writing
from steerscale.cli.steer_sweep import one_token, read_lines
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.interp.find import Found
    from steerscale.interp.sources import SAESource
    from steerscale.language_model import LanguageModel

WAYS = ("query", "pattern", "contrast", "task", "target", "direct", "direction", "probe")
LABELS = ("pattern", "contrast", "task")
"""Ways whose figures are of labels."""


def add_parser(commands: Any) -> None:
    """Register `find` among the sub-commands of `steerscale sae`."""
    parser = commands.add_parser(
        "find",
        help="latents that are about something",
        description="Rank the latents of an SAE by what they have to do with a text, a label, a token or a direction "
        "(docs/steering.md).",
    )
    add_source_arguments(parser)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--query", metavar="REGEX", help="at the peaks of strongest contexts in --text")
    ways.add_argument(
        "--pattern", metavar="REGEX", help="words of --text (a text file) that it matches, against all others"
    )
    ways.add_argument(
        "--contrast", type=Path, nargs=2, metavar=("WITH", "WITHOUT"), help="two files of texts, one a line"
    )
    ways.add_argument(
        "--task", metavar="pos|language|FILE", help="labelled text, as for `steerscale probe`; with --label and --data"
    )
    ways.add_argument("--target", metavar="TEXT", help="by attribution of this next token after --prompt")
    ways.add_argument("--direct", metavar="TEXT", help="by what the latent's direction adds to this token's logit")
    ways.add_argument("--direction", metavar="FILE[:NAME]", help="by cosine with a vector of a safetensors file")
    ways.add_argument("--probe", type=Path, metavar="DIR", help="by cosine with a probe's direction; with --label")
    parser.add_argument("--data", type=Path, metavar="FILE", help="of --task")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="of --task language")
    parser.add_argument("--label", metavar="NAME", help="of --task or --probe: the class the latents are to be about")
    parser.add_argument("--kind", metavar="KIND", help="of --probe, if there are several: logistic, diff_means, ...")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="of --target; repeatable")
    parser.add_argument(
        "--latent", type=int, nargs="+", metavar="J", help="tell the figures of these instead (labels only)"
    )
    parser.add_argument("--count", type=int, default=10, metavar="N", help="latents to show (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="of --query: sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=10_000, metavar="N", help="of labels: to read in each half (default: %(default)s)"
    )
    parser.add_argument(
        "--top-tokens", type=int, default=6, metavar="N", help="promoted tokens to show (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the halves (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.yaml",
        help="write a recipe that turns the first one up to --times the largest value seen (--query and labels)",
    )
    parser.add_argument("--times", type=float, default=2.0, metavar="X", help="of --save (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rank and print."""
    from steerscale.interp.features import token_effects
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout

    for option in ("count", "samples", "tokens", "top_tokens"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    source = read_source(args)
    with initialize(ParallelLayout()) as context:
        lm = source.language_model(context)
        found = _find(args, lm, source)
        if not found:
            raise ConfigError("no latent was found: is there such a thing in the text? --samples N reads more of it")
        promoted, _ = token_effects(lm, source.sae, [one.latent for one in found], args.top_tokens)
        pieces = [[lm.tokenizer.piece(token) for token, _ in promoted.pairs(row)] for row in range(len(found))]
    if args.save is not None:
        _save(args, source, found[0])
    if args.json:
        rows = [{"latent": one.latent, **one.figures, "promoted": tokens} for one, tokens in zip(found, pieces)]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print(_table(found, pieces))


def _save(args: argparse.Namespace, source: "SAESource", best: "Found") -> None:
    from steerscale.config import dump_yaml
    from steerscale.interp.recipes import EditRecipe, Recipe, SAERecipe

    target = args.times * best.figures.get("largest", 0.0)
    if not target:
        raise ConfigError(
            f"--save needs a latent's values in a text, of which latent {best.latent} has none: find it by text"
        )
    edit = EditRecipe(latent=best.latent, target=float(f"{target:.4g}"))
    recipe = Recipe(
        model=None if args.model is None else str(args.model),
        saes=[SAERecipe(path=str(args.source), name=args.sae, hook=args.hook, edits=[edit])],
        spare_special=source.spare_special,
        spare_first=source.spare_first,
    )
    with writing(args.save):
        args.save.write_text(dump_yaml(recipe), encoding="utf-8")


def _find(args: argparse.Namespace, lm: "LanguageModel", source: "SAESource") -> "list[Found]":
    from steerscale.interp import find
    from steerscale.interp.latent_index import build_index
    from steerscale.interp.text import sequences_of

    way = next(way for way in WAYS if getattr(args, way) is not None)
    if args.latent is not None and way not in LABELS:
        raise ConfigError(f"--latent goes with {', '.join('--' + one for one in LABELS)}: leave it out with --{way}")
    if way == "query":
        spared = {"spare_special": source.spare_special, "spare_first": source.spare_first}
        texts = sequences_of(lm, source.text_path(), samples=args.samples)
        index = build_index(lm, source.sae, texts, hook=source.hook, num_drawn=0, **spared)
        return find.find_by_query(lm, index, args.query, count=args.count)
    if way in LABELS:
        examples, label = _examples(args)
        return find.find_by_label(
            lm,
            source.sae,
            examples,
            label,
            hook=source.hook,
            count=args.count,
            vectors=args.tokens,
            drop_first=source.spare_first,
            latents=args.latent,
            seed=args.seed,
        )
    if way == "target":
        prompts = [lm.encode(prompt) for prompt in args.prompt or []]
        if not prompts:
            raise ConfigError("--target needs texts that it follows: give --prompt")
        target, first = one_token(lm, args.target), source.spare_first
        return find.find_by_attribution(
            lm, source.sae, prompts, target, hook=source.hook, count=args.count, drop_first=first
        )
    if way == "direct":
        return find.find_by_direct_effect(lm, source.sae, one_token(lm, args.direct), count=args.count)
    return find.find_by_direction(source.sae, _direction(args, source.hook), count=args.count)


def _examples(args: argparse.Namespace) -> tuple[list[Any], str]:
    from steerscale.interp.find import MATCH, pattern_examples
    from steerscale.interp.probes.labels import Example, read_examples

    if args.pattern is not None:
        if args.text is None:
            raise ConfigError("--pattern needs a text file: name it with --text")
        return pattern_examples(read_lines(args.text), args.pattern), MATCH
    if args.contrast is not None:
        files = dict(zip(("with", "without"), args.contrast))
        lines = [(name, line) for name, path in files.items() for line in read_lines(path)]
        return [Example(text=line, label=name, group=number) for number, (name, line) in enumerate(lines)], "with"
    if args.label is None:
        raise ConfigError("--task needs --label: the class the latents are to be about")
    return read_examples(args.task, path=args.data, classes=args.classes), args.label


def _direction(args: argparse.Namespace, hook: str) -> Any:
    from steerscale.interp.probes.edit import direction
    from steerscale.interp.probes.probe import read_probe
    from steerscale.interp.recipes import read_vector

    if args.direction is not None:
        path, _, name = args.direction.partition(":")
        return read_vector(Path(path), name or None)
    if args.label is None:
        raise ConfigError("--probe needs --label: the class whose direction is meant")
    probe = read_probe(args.probe, hook=hook, kind=args.kind)
    if not probe.is_linear:
        raise ConfigError(f"the probe {probe.name} has no direction: choose a linear one with --kind, like logistic")
    return direction(probe, probe.class_index(args.label))


def _table(found: "list[Found]", pieces: list[list[str]]) -> str:
    names = list(found[0].figures)
    rows = [["latent", *names]] + [[str(one.latent), *(f"{one.figures[name]:.4g}" for name in names)] for one in found]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(f"{line}  {end}" for line, end in zip(lines, ["promotes", *(" ".join(one) for one in pieces)]))
