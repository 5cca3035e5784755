"""`steerscale steer`: the next token and the text of a language model that a recipe, or latents named here, have changed."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sae_source import add_source_arguments
from steerscale.cli.sample import (
    add_layout_arguments,
    add_prompt_arguments,
    layout_of,
    sampling_of,
    token_table,
    writing,
)
from steerscale.cli.steer_sweep import sweep_parser
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.interp.recipes import Recipe
    from steerscale.interp.steering import Effect
    from steerscale.language_model import LanguageModel
    from steerscale.models.hooks import HookFunction

VALUES = ("target", "add", "scale")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "steer",
        help="change what a model says by latents of an SAE or a recipe",
        description="Change a language model's activations by latents of an SAE, or as a recipe file says; show the next "
        "token's distribution, the text and the loss on other text with and without it (docs/steering.md). "
        "`steerscale steer sweep RECIPE.yaml ...` measures strengths and baselines; see its --help.",
    )
    add_source_arguments(parser, source="RECIPE.yaml|RUN|SAE")
    parser.add_argument(
        "--latent", type=int, action="append", metavar="J", help="without a recipe; repeatable, with a value for each"
    )
    values = parser.add_mutually_exclusive_group()
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
    parser.add_argument("--save", type=Path, metavar="FILE.yaml", help="write what was asked for as a recipe")
    add_layout_arguments(parser)
    parser.set_defaults(run=run)
    _begins_with(parser, "sweep", sweep_parser())


def _begins_with(parser: argparse.ArgumentParser, word: str, other: argparse.ArgumentParser) -> None:
    """Leave a command line that begins with `word` to another parser: argparse has no sub-commands beside an argument."""
    usual = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] == word:
            return other.parse_known_args(args[1:], namespace)
        return usual(args, namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> None:
    """Steer and print."""
    from steerscale.config import dump_yaml
    from steerscale.interp.steering_plot import check_picture
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize

    if args.top_tokens < 1:
        raise ConfigError(f"--top-tokens must be at least 1, got {args.top_tokens}")
    if args.samples < 0:
        raise ConfigError(f"--samples must not be negative, got {args.samples}")
    if args.output is not None:
        check_picture(args.output)
    recipe, sampling = _recipe(args), sampling_of(args)
    opened = recipe.open(model=args.model)
    text = args.text or opened.text
    if args.samples and text is None:
        raise ConfigError("--samples needs a text to read: name a dataset or a file with --text")
    with initialize(layout_of(args)) as context:
        lm = load_language_model(opened.model, context, checkpoint=opened.checkpoint)
        functions = opened.functions(lm, strength=args.strength)
        if args.save is not None and context.rank == 0:
            with writing(args.save):
                whole = replace(recipe, strength=recipe.strength * args.strength)
                args.save.write_text(dump_yaml(whole), encoding="utf-8")
        for index, prompt in enumerate(args.prompt or [""]):
            _show_prompt(lm, functions, prompt, args, sampling, picture=args.output if index == 0 else None)
        if args.samples and text is not None:
            _show_loss(lm, functions, text, args.samples)


def _recipe(args: argparse.Namespace) -> "Recipe":
    from steerscale.interp.recipes import SUFFIXES, EditRecipe, Recipe, SAERecipe, load_recipe

    given = [option for option in VALUES if getattr(args, option) is not None]
    if args.source.suffix in SUFFIXES:
        options = [
            name for name in ("latent", *VALUES, "sae", "hook", "spare_first") if getattr(args, name) is not None
        ]
        options += [name for name in ("only_active", "all_tokens") if getattr(args, name)]
        if options:
            raise ConfigError(
                f"--{options[0].replace('_', '-')} says what {args.source} has to say: leave it out, or edit the recipe"
            )
        return load_recipe(args.source)
    if not args.latent or not given:
        raise ConfigError(
            f"there is nothing to steer: give --latent J and --target, --add or --scale with {args.source}, or a recipe"
        )
    (option,) = given
    values = getattr(args, option)
    if len(values) != len(args.latent):
        raise ConfigError(f"there are {len(args.latent)} --latent and {len(values)} --{option}: give a value for each")
    edits = [
        EditRecipe(latent=latent, only_active=args.only_active, **{option: value})
        for latent, value in zip(args.latent, values)
    ]
    return Recipe(
        model=None if args.model is None else str(args.model),
        saes=[SAERecipe(path=str(args.source), name=args.sae, hook=args.hook, edits=edits)],
        spare_special=False if args.all_tokens else None,
        spare_first=args.spare_first,
    )


def _show_prompt(
    lm: "LanguageModel",
    functions: "dict[str, HookFunction]",
    prompt: str,
    args: argparse.Namespace,
    sampling: Any,
    *,
    picture: Path | None,
) -> None:
    from steerscale.generation import generate
    from steerscale.interp.steering import effect

    tokens = lm.encode(prompt)
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

        with writing(picture):
            plot_effect(picture, found, [lm.tokenizer.piece(token) for token, *_ in rows], rows, title=title)


def _show_loss(lm: "LanguageModel", functions: "dict[str, HookFunction]", text: Path, samples: int) -> None:
    from steerscale.interp.steering import held_out_loss
    from steerscale.interp.text import sequences_of

    found = held_out_loss(lm, functions, sequences_of(lm, text, samples=samples))
    if found is not None and lm.context.at.tensor == 0:
        print(
            f"loss on {found.tokens:,} tokens of {text}: {found.before:.4f} without, {found.after:.4f} steered "
            f"({found.after - found.before:+.4f} nats a token)",
            flush=True,
        )
