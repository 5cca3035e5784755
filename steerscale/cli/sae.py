"""`steerscale sae`: `cost` is here, `convert`, `eval`, `features`, `find` and `browse` in modules of their own."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.cli import sae_bench, sae_browse, sae_convert, sae_eval, sae_features, sae_find
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.models.config import ModelConfig


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `steerscale sae`."""
    parser = subparsers.add_parser("sae", help="sparse autoencoders: cost of activations, formats")
    commands = parser.add_subparsers(dest="sae_command", metavar="COMMAND", required=True)
    cost = commands.add_parser(
        "cost",
        help="storing activations against streaming them",
        description="Bytes and price of storing a model's activations, and the FLOPs of making them when they are needed.",
    )
    cost.add_argument(
        "--model",
        required=True,
        metavar="SIZE|PATH",
        help="a size of configs/model, a YAML file of model keys, a run directory or a Hugging Face directory",
    )
    cost.add_argument("--tokens", type=_count, required=True, metavar="N", help="tokens, like 8e9")
    cost.add_argument("--hooks", nargs="+", required=True, metavar="HOOK", help="like blocks.15.hook_resid_post")
    cost.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of what is stored (default: %(default)s)"
    )
    cost.add_argument("--price-per-tb", type=float, metavar="PRICE", help="of storing 10^12 bytes, in any currency")
    cost.add_argument("--seq-len", type=int, metavar="N", help="tokens a sequence (default: the model's)")
    cost.set_defaults(run=_cost)
    sae_convert.add_parser(commands)
    sae_eval.add_parser(commands)
    sae_features.add_parser(commands)
    sae_find.add_parser(commands)
    sae_browse.add_parser(commands)
    sae_bench.add_parser(commands)


def _count(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number like 8e9, got {text!r}")
    return int(value)


def _cost(args: argparse.Namespace) -> None:
    from steerscale.activations.cost import TB, stream_cost, with_seq_len

    model = with_seq_len(_model(args.model), args.seq_len)
    cost = stream_cost(model, args.hooks, tokens=args.tokens, dtype=args.dtype, price_per_tb=args.price_per_tb)
    price = "" if cost.price_per_hook is None else f"{cost.price_per_hook:>16,.0f}"
    print(f"{'stored':<32}{'TB':>12}{'TiB':>12}" + ("" if cost.price is None else f"{'price':>16}"))
    for hook in args.hooks:
        print(f"{hook:<32}{cost.bytes_per_hook / TB:>12,.4g}{cost.bytes_per_hook / 2**40:>12,.4g}{price}")
    if len(args.hooks) > 1:
        total = "" if cost.price is None else f"{cost.price:>16,.0f}"
        print(f"{'all':<32}{cost.stored_bytes / TB:>12,.4g}{cost.stored_bytes / 2**40:>12,.4g}{total}")
    print(
        f"streamed: {cost.layers} of {model.num_layers} blocks, {cost.forward_flops_per_token:.4g} FLOPs a token, "
        f"{cost.forward_flops:.4g} in all, one pass for all hooks"
    )


def _model(name: str) -> "ModelConfig":
    from steerscale.cli.plan import MODELS
    from steerscale.config import from_mapping, load_yaml
    from steerscale.models.config import ModelConfig
    from steerscale.models.hf.families import config_from_hf
    from steerscale.rundir import CONFIG

    path = Path(name)
    if (path / "config.json").is_file():
        return config_from_hf(path)
    if path.is_dir():
        path = path / CONFIG
    elif path.suffix not in (".yaml", ".yml"):
        path = MODELS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
        raise ConfigError(f"--model {name}: {path} does not exist; name a file or directory, or a size: {known}")
    content = load_yaml(path)
    return from_mapping(ModelConfig, content.get("model", content), at="model")
