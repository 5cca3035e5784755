"""`steerscale sae features`: where latents are active, and what their directions say."""

import argparse
from typing import TYPE_CHECKING, Any

from steerscale.cli.sae_source import add_source_arguments, read_source
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.interp.features import Feature
    from steerscale.tokenizers.base import Tokenizer


def add_parser(commands: Any) -> None:
    """Register `features` among the sub-commands of `steerscale sae`."""
    parser = commands.add_parser(
        "features",
        help="top contexts of latents, tokens they promote",
        description="Where latents of an SAE are most active in a text, how often, and the tokens that their directions "
        "promote and suppress (docs/steering.md).",
    )
    add_source_arguments(parser)
    parser.add_argument("--latent", type=int, nargs="+", required=True, metavar="J", help="latents to look at")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="sequences to read (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=5, metavar="N", help="of each latent (default: %(default)s)")
    parser.add_argument("--top-tokens", type=int, default=8, metavar="N", help="of each latent (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Look and print."""
    from steerscale.interp.features import describe_latents
    from steerscale.interp.text import sequences_of
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout

    for option in ("contexts", "top_tokens"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    source = read_source(args)
    if source.text is None:
        raise ConfigError(f"{args.source} does not bring a text: name a dataset or a file with --text")
    with initialize(ParallelLayout()) as context:
        lm = source.language_model(context)
        features = describe_latents(
            lm,
            source.sae,
            args.latent,
            sequences_of(lm, source.text, samples=args.samples),
            hook=source.hook,
            spare_special=source.spare_special,
            spare_first=source.spare_first,
            num_contexts=args.contexts,
            num_tokens=args.top_tokens,
        )
    print("\n\n".join(_describe(feature, lm.tokenizer) for feature in features))


def _describe(feature: "Feature", tokenizer: "Tokenizer") -> str:
    lines = [
        f"latent {feature.latent}: active on {feature.frequency:.3%} of tokens, mean {feature.mean:.4g} there, "
        f"largest {feature.largest:.4g}"
    ]
    for name in ("promoted", "suppressed"):
        tokens = ", ".join(f"{tokenizer.piece(token)} {logit:+.2f}" for token, logit in getattr(feature, name))
        lines.append(f"  {name}: {tokens}")
    for context in feature.contexts:
        before, after = context.tokens[: context.at], context.tokens[context.at + 1 :]
        token = tokenizer.piece(context.tokens[context.at])
        text = f"{tokenizer.decode(before)} [[{token}]] {tokenizer.decode(after)}".replace("\n", "\\n")
        lines.append(f"  {context.value:8.4g}  {text}")
    return "\n".join(lines)
