"""`steerscale sae browse`: all latents of an SAE as one HTML page."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sae_source import add_source_arguments, read_source
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.metrics import format_duration

if TYPE_CHECKING:
    from steerscale.interp.sources import SAESource
    from steerscale.language_model import LanguageModel

POSITIVE = ("samples", "contexts", "drawn", "width", "top_tokens")


def add_parser(commands: Any) -> None:
    """Register `browse` among the sub-commands of `steerscale sae`."""
    parser = commands.add_parser(
        "browse",
        help="all latents as one HTML page",
        description="Read a text once and write a page that needs no network: of each latent how often it is active, its "
        "values, strongest and other contexts, tokens it promotes, latents like it; sorted, searchable "
        "(docs/latent_browser.md). On several ranks: torchrun --nproc-per-node 2 $(which steerscale) sae browse ... --tensor 2",
    )
    add_source_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, like latents.html")
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="sequences to read (default: %(default)s)"
    )
    parser.add_argument(
        "--contexts", type=int, default=12, metavar="N", help="strongest contexts of a latent (default: %(default)s)"
    )
    parser.add_argument(
        "--drawn", type=int, default=2, metavar="N", help="contexts from each octave of values (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=12, metavar="N", help="tokens of a context on either side (default: %(default)s)"
    )
    parser.add_argument(
        "--top-tokens", type=int, default=10, metavar="N", help="promoted, suppressed (default: %(default)s)"
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=8,
        metavar="N",
        help="latents with the most similar decoder rows; 0 spares the comparison of all pairs (default: %(default)s)",
    )
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, and write the page."""
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout

    for option in POSITIVE:
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if args.neighbours < 0:
        raise ConfigError(f"--neighbours must not be negative, got {args.neighbours}")
    if not args.output.parent.is_dir():
        raise ConfigError(f"-o {args.output}: {args.output.parent} is no directory; create it first")
    source = read_source(args)
    if source.text is None:
        raise ConfigError(f"{args.source} does not bring a text: name a dataset or a file with --text")
    with initialize(ParallelLayout(tensor=args.tensor)) as context:
        lm = source.language_model(context)
        page = _page(args, source, lm)
        if context.rank == 0:
            _write(args.output, page)


def _page(args: argparse.Namespace, source: "SAESource", lm: "LanguageModel") -> str:
    from steerscale.interp.features import decoder_neighbours, token_effects
    from steerscale.interp.latent_index import build_index
    from steerscale.interp.latent_page import Heading, latent_page
    from steerscale.interp.text import sequences_of

    assert source.text is not None
    assert source.lm is not None
    sae, speaks = source.sae, lm.context.rank == 0
    index = build_index(
        lm,
        sae,
        sequences_of(lm, source.text, samples=args.samples),
        hook=source.hook,
        spare_special=source.spare_special,
        spare_first=source.spare_first,
        num_top=args.contexts,
        num_drawn=args.drawn,
        width=args.width,
        on_progress=_progress(args.samples) if speaks else None,
    )
    if speaks:
        dead = int((index.active_J == 0).sum())
        print(
            f"{index.num_tokens:,} tokens read, {dead:,} of {sae.num_latents:,} latents never active; comparing them",
            file=sys.stderr,
            flush=True,
        )
    effects = token_effects(lm, sae, index.latents, args.top_tokens)
    neighbours = decoder_neighbours(sae, args.neighbours, lm.context.device)
    heading = Heading(
        name=args.sae or args.source.resolve().name,
        model=source.lm.resolve().name,
        hook=source.hook,
        architecture=sae.architecture,
        text=source.text.resolve().name,
    )
    return latent_page(heading, index, effects, neighbours, lm.tokenizer)


def _write(output: Path, page: str) -> None:
    from steerscale.html_page import write_whole

    try:
        write_whole(output, page)
    except OSError as error:
        raise SteerscaleError(f"{output} cannot be written: {error}") from error
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)


def _progress(total: int) -> Callable[[int], None]:
    """Says on stderr how far reading is: in place on a terminal, else every ten seconds."""
    terminal = sys.stderr.isatty()
    begin = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= (0.2 if terminal else 10.0) or (terminal and done == total):
            last = now
            rest = (now - begin) / done * (total - done)
            text = f"{done} of {total} sequences, ETA {format_duration(rest)}"
            end = "" if terminal and done < total else "\n"
            print(f"\r{text}   " if terminal else text, end=end, file=sys.stderr, flush=True)

    return report
