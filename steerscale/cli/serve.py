"""`steerscale serve`: a language model behind OpenAI's HTTP interface, steered by recipes."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from steerscale.errors import ConfigError

PACKAGES = ("starlette", "uvicorn", "jinja2")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "serve",
        help="a model behind OpenAI's HTTP interface, steered by recipes",
        description="Serve /v1/completions and /v1/chat/completions on 127.0.0.1, with recipes to choose in each request: "
        "model=NAME:RECIPE (docs/serve.md).",
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIRECTORY", help="run directory or Hugging Face model")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="one of the run's checkpoints (default: the newest)"
    )
    parser.add_argument(
        "--recipes", type=Path, nargs="+", default=[], metavar="PATH", help="recipe files, or directories of them"
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call the model (default: its directory's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8266, help="0: a free one (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install 'steerscale[serve]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("steerscale serve runs in one process: start it without torchrun")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must be from 0 to 65535, got {args.port}")
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout
    from steerscale.serve.catalogue import Catalogue, open_recipes
    from steerscale.serve.run import is_loopback, listen, serve

    recipes = open_recipes(args.recipes, args.model)
    with listen(args.host, args.port) as listening, initialize(ParallelLayout()) as context:
        lm = load_language_model(args.model, context, checkpoint=args.checkpoint)
        catalogue = Catalogue(lm, args.name or args.model.resolve().name, recipes)
        host, port = listening.getsockname()[:2]
        if not is_loopback(listening):
            print(
                f"steerscale: warning: {host} can be reached from other machines, and there is no password: anyone there "
                "can use the model",
                file=sys.stderr,
            )

        def ready() -> None:
            address = f"[{host}]" if ":" in host else host
            print(f"http://{address}:{port}/v1  {', '.join(catalogue.names)}  (Ctrl-C ends it)", flush=True)

        serve(lm, catalogue, listening, on_ready=ready)
