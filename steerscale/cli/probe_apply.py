"""`steerscale probe MODEL --apply DIR`: what a model says when activations are edited by a probe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sample import add_prompt_arguments, layout_of, sampling_of, token_table, writing
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from steerscale.interp.steering import Effect
    from steerscale.language_model import LanguageModel
    from steerscale.models.hooks import HookFunction

EDITS = ("set", "add", "project", "swap")


def add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe, the edit, and on what it is tried."""
    group = parser.add_argument_group("applying (--apply)")
    group.add_argument("--hook", nargs="+", metavar="HOOK", help="where: one or more hook points that have a probe")
    group.add_argument("--kind", metavar="KIND", help="of the probe, where there are several")
    edits = group.add_mutually_exclusive_group()
    edits.add_argument("--set", metavar="CLASS=MARGIN", help="the least change after which the class leads by MARGIN")
    edits.add_argument("--add", metavar="CLASS=X", help="add the class's direction, X distances between class means")
    edits.add_argument("--project", nargs="?", const="", metavar="CLASS", help="project out its direction, or all")
    edits.add_argument("--swap", nargs=2, metavar="CLASS", help="mirror at the boundary of two classes")
    group.add_argument("--against", metavar="CLASS", help="--set, --add, --project: with regard to this class alone")
    group.add_argument("--only", metavar="CLASS", help="act only at tokens that the probe takes for this class")
    group.add_argument(
        "--strength", type=float, nargs="+", default=[1.0], metavar="X", help="factors of the change (default: 1)"
    )
    group.add_argument(
        "--positions",
        metavar="A:B",
        help="act there only in the prompt, like -1 or 2:5 (default: everywhere, new tokens as well)",
    )
    group.add_argument("--watch", nargs="+", default=[], metavar="TEXT", help="show the probability of its first token")
    group.add_argument("--top-tokens", type=int, default=10, metavar="N", help="in the table (default: %(default)s)")
    group.add_argument("--text", type=Path, metavar="PATH", help="dataset or text file to measure the loss on")
    group.add_argument(
        "--samples", type=int, default=16, metavar="N", help="sequences of --text (default: %(default)s)"
    )
    add_prompt_arguments(parser, temperature=0.0, top_p=1.0)


def apply(args: argparse.Namespace) -> None:
    """Edit and print."""
    from steerscale.interp.probes.edit import probe_edit
    from steerscale.interp.probes.probe import read_probe
    from steerscale.interp.steering_plot import check_picture
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize

    if args.output is not None:
        check_picture(args.output)
    edit, positions = _edit(args), parse_positions(args.positions)
    probes = [read_probe(args.apply, hook=hook, kind=args.kind) for hook in args.hook or [None]]
    with initialize(layout_of(args)) as context:
        lm = load_language_model(args.model, context, checkpoint=args.checkpoint, precision=args.precision)
        for probe in probes:
            if probe.width != lm.model.d_model:
                raise ConfigError(
                    f"the probe {probe.name} is of activations of width {probe.width}, this model has {lm.model.d_model}"
                )
        there, everywhere = (
            {
                strength: {
                    probe.hook: probe_edit(probe, **edit, strength=strength, positions=where) for probe in probes
                }
                for strength in args.strength
            }
            for where in (positions, None)
        )
        for index, prompt in enumerate(args.prompt or [""]):
            _show_prompt(lm, there, prompt, args, picture=args.output if index == 0 else None)
        if args.text is not None:
            # Positions of the prompt mean nothing in other text: the cost is that of the edit at every token.
            _show_loss(lm, everywhere, args)


def _edit(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `probe_edit` from the command line's."""
    mode = next((name for name in EDITS if getattr(args, name) is not None), None)
    if mode is None:
        raise ConfigError("--apply needs an edit: --set CLASS=MARGIN, --add CLASS=X, --project [CLASS] or --swap A B")
    if args.top_tokens < 1:
        raise ConfigError(f"--top-tokens must be at least 1, got {args.top_tokens}")
    found: dict[str, Any] = {"mode": mode, "other": args.against, "where": args.only}
    if mode == "swap":
        if args.against is not None:
            raise ConfigError("--swap names both classes itself: leave out --against")
        return {**found, "target": args.swap[0], "other": args.swap[1]}
    if mode == "project":
        return {**found, "target": args.project or None}
    name, sign, value = getattr(args, mode).rpartition("=")
    try:
        return {**found, "target": name, "value": float(value)} if sign else {**found, "target": value, "value": 1.0}
    except ValueError:
        raise ConfigError(f"--{mode} must be like CLASS=1.5, got {getattr(args, mode)!r}") from None


def parse_positions(text: str | None) -> slice | list[int] | None:
    """`-1`, `2,5` or `2:5`, as `interventions` takes them. Raises ConfigError for anything else."""
    if text is None:
        return None
    try:
        if ":" in text:
            begin, end = text.split(":")
            return slice(int(begin) if begin else None, int(end) if end else None)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--positions must be like -1, 2,5 or 2:5, got {text!r}") from None


def _show_prompt(
    lm: "LanguageModel",
    edits: "Mapping[float, Mapping[str, HookFunction]]",
    prompt: str,
    args: argparse.Namespace,
    *,
    picture: Path | None,
) -> None:
    from steerscale.generation import generate
    from steerscale.interp.steering import effect

    tokens, sampling = lm.encode(prompt), sampling_of(args)
    speaks = lm.context.is_last_stage and lm.context.at.tensor == 0
    watched = {text: lm.tokenizer.encode(text)[:1] for text in args.watch}
    for text, ids in watched.items():
        if not ids:
            raise ConfigError(f"--watch {text!r} has no token")
    settings: dict[str, Any] = {"max_tokens": args.max_tokens, "stop": args.stop}
    # New tokens come one at a time: positions of the prompt would mean something else there.
    generates = args.positions is None and args.max_tokens > 0
    plain = generate(lm, [tokens], sampling, **settings)[0].text if generates else ""
    for number, (strength, functions) in enumerate(edits.items()):
        found = effect(lm, functions, tokens)
        text = generate(lm, [tokens], sampling, functions=functions, **settings)[0].text if generates else ""
        if found is None or not speaks:
            continue
        print(f"{prompt!r}, strength {strength:g}: the next token, KL {found.kl:.4g} nats")
        _show_effect(lm, found, watched, args.top_tokens, picture if number == 0 else None, title=prompt)
        if generates:
            print(f"without: {prompt}{plain}\nedited:  {prompt}{text}")
        print(flush=True)


def _show_effect(
    lm: "LanguageModel",
    found: "Effect",
    watched: "Mapping[str, list[int]]",
    count: int,
    picture: Path | None,
    *,
    title: str,
) -> None:
    rows = found.rows(count)
    shown = {token for token, *_ in rows}
    for (token,) in watched.values():
        if token not in shown:
            rows.append((token, float(found.before_V[token]), float(found.after_V[token])))
    table = [(token, (before, after, after - before)) for token, before, after in rows]
    print(token_table(lm.tokenizer, table, ("before", "after", "change")))
    if picture is not None:
        from steerscale.interp.steering_plot import plot_effect

        with writing(picture):
            plot_effect(picture, found, [lm.tokenizer.piece(token) for token, *_ in rows], rows, title=title)


def _show_loss(
    lm: "LanguageModel", edits: "Mapping[float, Mapping[str, HookFunction]]", args: argparse.Namespace
) -> None:
    from math import exp

    from steerscale.interp.steering import held_out_loss
    from steerscale.interp.text import sequences_of

    for strength, functions in edits.items():
        found = held_out_loss(lm, functions, sequences_of(lm, args.text, samples=args.samples))
        if found is not None and lm.context.at.tensor == 0:
            print(
                f"strength {strength:g}: loss on {found.tokens:,} tokens of {args.text}: {found.before:.4f} without, "
                f"{found.after:.4f} edited ({found.after - found.before:+.4f} nats a token; perplexity "
                f"{exp(found.before):.2f}, {exp(found.after):.2f})",
                flush=True,
            )
