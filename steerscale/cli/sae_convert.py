"""`steerscale sae convert`: SAEs from runs and public formats to public formats."""

import argparse
from pathlib import Path
from typing import Any

from steerscale.errors import ConfigError

# Names in steerscale.sae.formats, which --help should not have to import.
FORMATS = ("saelens", "sparsify", "gemma_scope", "gemma_scope_2", "llama_scope")


def add_parser(commands: Any) -> None:
    """Register `convert` among the sub-commands of `steerscale sae`."""
    parser = commands.add_parser(
        "convert",
        help="write an SAE in another format",
        description="Write a trained SAE, or one in a public format, in a public format (docs/sae_formats.md).",
    )
    parser.add_argument(
        "source", type=Path, help="run directory (its newest checkpoint), checkpoint, or directory of an SAE"
    )
    parser.add_argument("output", type=Path, help="directory to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="saelens", help="to write (default: %(default)s)")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="to read (default: by the files)")
    parser.add_argument("--sae", metavar="NAME", help="which one, if a run trained several")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the language model's name, kept with it (default: as it is; a run's: its directory)",
    )
    parser.add_argument(
        "--unit-norm", action="store_true", help="bring decoder rows to norm 1, features times the norms"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, fold, write."""
    from dataclasses import replace

    from steerscale.sae.formats import write_sae

    weights = _read(args)
    if args.model is not None:
        weights = replace(weights, model=args.model)
    if args.unit_norm:
        weights = weights.fold_scale().fold_decoder_norm()  # scales are folded in writing: norms would change
    write_sae(weights, args.output, args.format)
    print(f"{args.source} -> {args.output}: {weights.architecture}, {weights.num_latents:,} latents, {args.format}")


def _read(args: argparse.Namespace) -> Any:
    from steerscale.checkpoint.store import STATE
    from steerscale.load import newest_checkpoint
    from steerscale.rundir import CONFIG, read_config
    from steerscale.sae.formats import read_sae
    from steerscale.sae.trained import read_trained

    is_run = (args.source / CONFIG).is_file()
    if is_run:
        lm = (read_config(args.source).get("stream") or {}).get("lm")
        return read_trained(newest_checkpoint(args.source), args.sae, model=lm and Path(lm).name)
    if (args.source / STATE).is_file():
        return read_trained(args.source, args.sae)
    if args.sae is not None:
        raise ConfigError(f"--sae {args.sae}: {args.source} is no run or checkpoint, and holds one SAE")
    return read_sae(args.source, args.source_format)
