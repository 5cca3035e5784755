"""`steerscale sample`: text from a trained model, or the distribution of its next token."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from steerscale.parallel.layout import ParallelLayout
    from steerscale.sampling import Sampling
    from steerscale.tokenizers.base import Tokenizer


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "sample",
        help="generate text from a run or a Hugging Face model",
        description="Generate text from a run's newest checkpoint, or from a Hugging Face model that our GPT can be. On "
        "several ranks: torchrun --nproc-per-node 2 $(which steerscale) sample ... --tensor 2",
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIRECTORY", help="run directory or Hugging Face model")
    add_prompt_arguments(parser, temperature=0.8, top_p=0.95)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="one of the run's checkpoints (default: the newest)"
    )
    parser.add_argument(
        "--top-tokens", type=int, metavar="N", help="show the N most probable next tokens instead of text"
    )
    add_layout_arguments(parser)
    parser.set_defaults(run=run)


def add_prompt_arguments(parser: argparse.ArgumentParser, *, temperature: float, top_p: float) -> None:
    """Prompts and how to go on from them."""
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on from; several times for several texts (default: the start of a document)",
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add_sampling_arguments(parser, max_tokens=64, temperature=temperature, top_p=top_p)


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float
) -> None:
    """How tokens are chosen, and how many."""
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="new tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most probable tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=top_p, metavar="P", help="nucleus: their probability mass (default: %(default)s)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="at least P times as probable as the first (default: off)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 against loops (default: off)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is cut, under torchrun."""
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks (default: %(default)s)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline stages (default: %(default)s)")


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """The settings of `add_sampling_arguments`."""
    from steerscale.sampling import Sampling

    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def layout_of(args: argparse.Namespace) -> "ParallelLayout":
    """The layout of `add_layout_arguments`."""
    from steerscale.parallel.layout import ParallelLayout

    return ParallelLayout(tensor=args.tensor, pipeline=args.pipeline)


def make_directory(path: Path) -> None:
    """For results that come at the end of long work: whether they can be written is known before it. Raises DataError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the directory {path} cannot be made: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`, whose directory is made. Raises DataError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def token_table(tokenizer: "Tokenizer", rows: list[tuple[int, tuple[float, ...]]], columns: tuple[str, ...]) -> str:
    """A line a token: how the vocabulary writes it, then the numbers."""
    pieces = [tokenizer.piece(token) for token, _ in rows]
    width = max(5, *(len(piece) for piece in pieces))
    lines = ["token".ljust(width) + "".join(column.rjust(10) for column in columns)]
    lines += [
        piece.ljust(width) + "".join(f"{value:10.4f}" for value in values) for piece, (_, values) in zip(pieces, rows)
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Print prompts and what the model makes of them, as it comes if there is one."""
    from steerscale.generation import generate
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize

    prompts: list[str] = args.prompt or [""]
    if args.top_tokens is not None and args.top_tokens < 1:
        raise ConfigError(f"--top-tokens must be at least 1, got {args.top_tokens}")
    sampling = sampling_of(args)
    with initialize(layout_of(args)) as context:
        lm = load_language_model(args.model, context, checkpoint=args.checkpoint)
        tokens = [lm.encode(prompt) for prompt in prompts]
        if args.top_tokens is not None:
            _show_next(lm, prompts, tokens, sampling, args.top_tokens)
            return
        live = len(prompts) == 1 and context.rank == 0

        def show(row: int, piece: str) -> None:
            print(piece, end="", flush=True)

        if live:
            print(prompts[0], end="", flush=True)
        found = generate(
            lm, tokens, sampling, max_tokens=args.max_tokens, stop=args.stop, on_text=show if live else None
        )
        if live:
            print()
        elif context.rank == 0:
            print("\n\n".join(prompt + one.text for prompt, one in zip(prompts, found)))


def _show_next(lm: Any, prompts: list[str], tokens: list[list[int]], sampling: "Sampling", count: int) -> None:
    from steerscale.generation import next_logits
    from steerscale.sampling import next_token_distribution

    for prompt, ids in zip(prompts, tokens):
        logits_V = next_logits(lm, ids)
        if logits_V is None or lm.context.at.tensor:
            continue
        model_V = logits_V.softmax(dim=-1)
        sampled_V = next_token_distribution(logits_V[None], sampling, texts=[ids])[0]
        chosen = model_V.topk(min(count, len(model_V))).indices.tolist()
        rows = [(token, (float(model_V[token]), float(sampled_V[token]))) for token in chosen]
        print(f"{prompt!r} goes on with")
        print(token_table(lm.tokenizer, rows, ("model", "sampled")))
    sys.stdout.flush()
