"""`steerscale export` and `steerscale import`: models to and from Hugging Face directories."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-commands."""
    export = subparsers.add_parser(
        "export",
        help="write a trained model as a Hugging Face directory",
        description="Write a trained model as a directory that transformers' AutoModelForCausalLM.from_pretrained loads.",
    )
    export.add_argument("source", type=Path, help="run directory (its newest checkpoint), or a checkpoint directory")
    export.add_argument("-o", "--output", type=Path, required=True, help="directory to write; must not exist")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    export.add_argument("--tokenizer", type=Path, help="Hugging Face tokenizer directory whose files are copied")
    export.add_argument("--eos-token-id", type=int, help="token at which generation ends (default: not said)")
    export.set_defaults(run=run_export)
    imported = subparsers.add_parser(
        "import",
        help="the configuration of a Hugging Face model",
        description="Print the model configuration of a Hugging Face directory as YAML, for configs/model/. "
        "Its weights are what a run with train.init_from=DIRECTORY starts from.",
    )
    imported.add_argument("source", type=Path, help="Hugging Face directory (config.json, safetensors)")
    imported.set_defaults(run=run_import)


def run_export(args: argparse.Namespace) -> None:
    """Write the directory, one parameter after the other: the model need not fit into memory."""
    import torch

    from steerscale.checkpoint.store import STATE, load_state
    from steerscale.config import from_mapping
    from steerscale.errors import ConfigError
    from steerscale.load import newest_checkpoint
    from steerscale.models.config import ModelConfig
    from steerscale.models.hf.export import parameter_names, write_hf

    checkpoint = args.source if (args.source / STATE).is_file() else newest_checkpoint(args.source)
    state, reader = load_state(checkpoint)
    if "num_layers" not in state.get("model", {}):
        raise ConfigError(
            f"{checkpoint} is of no GPT; `steerscale sae convert` writes sparse autoencoders in public formats"
        )
    model = from_mapping(ModelConfig, state["model"], at="model")
    names = parameter_names(model)

    def wholes() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            shape = reader.shapes.get(name, ())
            yield name, reader.read("weight", name, offset=[0] * len(shape), shape=shape).view(shape)

    write_hf(
        model,
        wholes(),
        args.output,
        dtype=getattr(torch, args.dtype),
        tokenizer_directory=args.tokenizer,
        eos_token_id=args.eos_token_id,
    )
    print(f"{checkpoint} -> {args.output}: {len(names)} parameters in {args.dtype}")


def run_import(args: argparse.Namespace) -> None:
    """Print the model's configuration."""
    from steerscale.config import dump_yaml
    from steerscale.models.hf.families import config_from_hf

    print(dump_yaml(config_from_hf(args.source)), end="")
