"""An SAE and what belongs to it, from whatever a user named: what `steer` and `sae features` share."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.sae.weights import SAEWeights


@dataclass(frozen=True, kw_only=True)
class SAESource:
    """An SAE, its language model and a text it can be tried on."""

    sae: "SAEWeights"
    hook: str
    lm: Path
    checkpoint: Path | None
    """Of the language model, if it is a run and not to be its newest."""
    text: Path | None
    """A dataset or text file."""
    spare_special: bool
    """Whether it knows nothing of begin, end, padding and unknown tokens."""
    spare_first: int
    """First positions that it knows nothing of."""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The SAE, its model, text."""
    parser.add_argument(
        "source", type=Path, metavar="RUN|SAE", help="run directory of SAEs, or an SAE in a public format"
    )
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


def read_source(args: argparse.Namespace) -> SAESource:
    """Read the SAE. Raises ConfigError where something has to be named."""
    from steerscale.config import from_mapping
    from steerscale.load import newest_checkpoint
    from steerscale.rundir import CONFIG, read_config
    from steerscale.sae.formats import read_sae
    from steerscale.sae.trained import read_trained
    from steerscale.train.config import RunConfig

    lm, checkpoint, text, spare_special, spare_first = args.model, None, args.text, True, 0
    if (args.source / CONFIG).is_file():
        config = from_mapping(RunConfig, read_config(args.source))
        sae = read_trained(newest_checkpoint(args.source), args.sae)
        if config.stream is not None:
            spare_special, spare_first = config.stream.drop_special, config.stream.drop_first
        if config.stream is not None and lm is None:
            lm = Path(config.stream.lm)
            checkpoint = None if config.stream.checkpoint is None else Path(config.stream.checkpoint)
        if config.data is not None and text is None:
            text = Path(next(iter(config.data.weights)))
    else:
        if args.sae is not None:
            raise ConfigError(f"--sae {args.sae}: {args.source} is no run, and holds one SAE")
        sae = read_sae(args.source)
    if lm is None:
        model = f", which says it is {sae.model}" if sae.model else ""
        raise ConfigError(f"{args.source} does not bring its language model{model}: name its directory with --model")
    hook = args.hook or sae.hook
    if hook is None:
        raise ConfigError(f"{args.source} does not say which hook point it belongs to: name it with --hook")
    return SAESource(
        sae=sae,
        hook=hook,
        lm=lm,
        checkpoint=checkpoint,
        text=text,
        spare_special=spare_special and not args.all_tokens,
        spare_first=spare_first if args.spare_first is None else args.spare_first,
    )
