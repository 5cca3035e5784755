"""`steerscale steer`: the next token and the text of a language model with a latent of an SAE turned up or down."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sae_source import add_source_arguments, read_source
from steerscale.cli.sample import add_layout_arguments, add_prompt_arguments, layout_of, sampling_of, token_table
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.interp.steering import Edit, Effect, Steering
    from steerscale.language_model import LanguageModel

MODES = {"target": "clamp", "add": "add", "scale": "scale"}


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "steer",
        help="change what a model says by latents of an SAE",
        description="Add the delta of changed latents to a language model's activations; show the next token's distribution, "
        "the text and the loss on other text with and without it (docs/steering.md).",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--latent", type=int, action="append", required=True, metavar="J", help="repeatable, with a value for each"
    )
    values = parser.add_mutually_exclusive_group(required=True)
    values.add_argument("--target", type=float, action="append", metavar="V", help="value the latent is to have")
    values.add_argument("--add", type=float, action="append", metavar="V", help="what is added to its value")
    values.add_argument(
        "--scale", type=float, action="append", metavar="X", help="factor of its value; 0 suppresses it"
    )
    parser.add_argument("--only-active", action="store_true", help="only at tokens where the latent is active")
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="X", help="factor of the whole change (default: %(default)s)"
    )
    add_prompt_arguments(parser, temperature=0.0, top_p=1.0)
    parser.add_argument("--top-tokens", type=int, default=10, metavar="N", help="in the table (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="measure the loss on N sequences of --text, with and without (default: %(default)s)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="picture of the first prompt's table")
    add_layout_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Steer and print."""
    from steerscale.interp.steering import Steering
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize

    if args.top_tokens < 1:
        raise ConfigError(f"--top-tokens must be at least 1, got {args.top_tokens}")
    edits, sampling, source = _edits(args), sampling_of(args), read_source(args)
    if args.samples and source.text is None:
        raise ConfigError("--samples needs a text to read: name a dataset or a file with --text")
    with initialize(layout_of(args)) as context:
        lm = load_language_model(source.lm, context, checkpoint=source.checkpoint)
        steering = Steering(
            source.sae,
            edits,
            strength=args.strength,
            hook=source.hook,
            spare_special=source.spare_special,
            spare_first=source.spare_first,
        )
        for index, prompt in enumerate(args.prompt or [""]):
            _show_prompt(lm, steering, prompt, args, sampling, picture=args.output if index == 0 else None)
        if args.samples and source.text is not None:
            _show_loss(lm, steering, source.text, args.samples)


def _edits(args: argparse.Namespace) -> "list[Edit]":
    from steerscale.interp.steering import Edit

    option = next(option for option in MODES if getattr(args, option) is not None)
    values = getattr(args, option)
    if len(values) != len(args.latent):
        raise ConfigError(f"there are {len(args.latent)} --latent and {len(values)} --{option}: give a value for each")
    where: Any = "active" if args.only_active else "all"
    mode: Any = MODES[option]
    return [Edit(latent=latent, value=value, mode=mode, where=where) for latent, value in zip(args.latent, values)]


def _show_prompt(
    lm: "LanguageModel",
    steering: "Steering",
    prompt: str,
    args: argparse.Namespace,
    sampling: Any,
    *,
    picture: Path | None,
) -> None:
    from steerscale.generation import generate
    from steerscale.interp.steering import effect

    functions, tokens = steering.functions(lm), lm.encode(prompt)
    found = effect(lm, functions, tokens)
    settings: dict[str, Any] = {"max_tokens": args.max_tokens, "stop": args.stop}
    plain, steered = (
        generate(lm, [tokens], sampling, functions=chosen, **settings)[0].text for chosen in ({}, functions)
    )
    if found is not None and lm.context.at.tensor == 0:
        print(f"{prompt!r}: the next token, KL {found.kl:.4g} nats")
        _show_effect(lm, found, args.top_tokens, picture, title=prompt or "start of a document")
        print(f"\nwithout: {prompt}{plain}\nsteered: {prompt}{steered}\n", flush=True)


def _show_effect(lm: "LanguageModel", found: "Effect", count: int, picture: Path | None, *, title: str) -> None:
    rows = found.rows(count)
    table = [(token, (before, after, after - before)) for token, before, after in rows]
    print(token_table(lm.tokenizer, table, ("before", "after", "change")))
    if picture is not None:
        from steerscale.interp.steering_plot import plot_effect

        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_effect(picture, found, [lm.tokenizer.piece(token) for token, *_ in rows], rows, title=title)


def _show_loss(lm: "LanguageModel", steering: "Steering", text: Path, samples: int) -> None:
    from steerscale.interp.steering import held_out_loss
    from steerscale.interp.text import sequences_of

    found = held_out_loss(lm, steering.functions(lm), sequences_of(lm, text, samples=samples))
    if found is not None and lm.context.at.tensor == 0:
        print(
            f"loss on {found.tokens:,} tokens of {text}: {found.before:.4f} without, {found.after:.4f} steered "
            f"({found.after - found.before:+.4f} nats a token)",
            flush=True,
        )
