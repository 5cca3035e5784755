"""An SAE and what belongs to it, from what a user named on the command line: what `steer` and `sae features` share."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.interp.sources import SAESource


def add_source_arguments(parser: argparse.ArgumentParser, *, source: str = "RUN|SAE") -> None:
    """The SAE (`source`: what a user may name), its model, text."""
    recipe = "a recipe, a " if "RECIPE" in source else ""
    help = f"{recipe}run directory of SAEs, or an SAE in a public format"
    parser.add_argument("source", type=Path, metavar=source, help=help)
    parser.add_argument("--sae", metavar="NAME", help="which one, if a run trained several")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="language model: run or Hugging Face directory (default: the run's own)",
    )
    parser.add_argument("--hook", metavar="HOOK", help="where the SAE belongs (default: where it says)")
    parser.add_argument(
        "--spare-first",
        type=int,
        metavar="N",
        help="leave out N first positions, on which the SAE was not trained (default: the run's stream.drop_first, or 0)",
    )
    parser.add_argument(
        "--all-tokens", action="store_true", help="do not leave out begin, end, padding and unknown tokens"
    )
    parser.add_argument(
        "--text", type=Path, metavar="PATH", help="dataset or text file to read (default: the run's held-out split)"
    )


def read_source(args: argparse.Namespace) -> "SAESource":
    """Read the SAE. Raises ConfigError where something has to be named."""
    from steerscale.interp.sources import open_sae

    if args.spare_first is not None and args.spare_first < 0:
        raise ConfigError(f"--spare-first must not be negative, got {args.spare_first}")
    source = open_sae(args.source, name=args.sae, hook=args.hook)
    if args.model is not None:
        source = replace(source, lm=args.model, checkpoint=None)
    return replace(
        source,
        text=args.text or source.text,
        spare_special=source.spare_special and not args.all_tokens,
        spare_first=source.spare_first if args.spare_first is None else args.spare_first,
    )
