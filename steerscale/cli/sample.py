"""`steerscale sample`: text from a trained model."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "sample",
        help="generate text from a run",
        description="Generate text from the newest checkpoint of a run directory.",
    )
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="nucleus: their probability mass (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it."""
    from steerscale.load import load_gpt
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout
    from steerscale.sampling import generate

    with initialize(ParallelLayout()) as context:
        trained = load_gpt(args.run_dir, context)
        tokenizer = trained.tokenizer
        prompt = [tokenizer.eos_id, *tokenizer.encode(args.prompt)]
        tokens = generate(
            trained.chunks[0],
            prompt,
            max_tokens=args.max_tokens,
            eos_id=tokenizer.eos_id,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        print(args.prompt + tokenizer.decode([token for token in tokens if token != tokenizer.eos_id]))
