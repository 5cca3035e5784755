"""`steerscale plan`: which layouts fit, how fast they are predicted to be, and why the others do not fit."""

import argparse
import json
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig, Recompute

if TYPE_CHECKING:
    from steerscale.planning.machine import Machine

VOCABULARY = 51200
"""Taken where a model's file leaves it to the dataset: GPT-2's, padded, as in the papers on Megatron."""
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
T = TypeVar("T")


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="which layouts fit, and how fast they are",
        description="Memory and predicted time of every layout of a model on a number of GPUs, and why the others are out. "
        "Lists are written 1,2,4; what is left out is searched. With --calibrate: fit the prediction to measured runs.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="SIZE|FILE",
        help="a size of configs/model, a YAML file of model keys, or a run's config.yaml",
    )
    add("--gpus", type=int, help="GPUs, and so ranks, in all")
    add("--global-batch-size", type=int, metavar="N", help="sequences in one optimizer step")
    add("--gpu", metavar="NAME", help="a100-40gb, a100-80gb, h100, h200, ...")
    add("--cluster", metavar="NAME|FILE", help="a profile of configs/cluster: its GPUs, nodes and links")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what --calibrate wrote: efficiency, and without --gpu all else",
    )
    add("--engine", choices=("megatron", "deepspeed"), default="megatron", help="default: megatron")
    add("--precision", choices=("bf16", "fp32", "fp16"), help="default: bf16; fp16 is DeepSpeed's only")
    add("--offload-optimizer", action="store_true", help="DeepSpeed: keep the optimizer's state in the host's memory")
    add("--vocab-size", type=int, metavar="N", help=f"tokens, where the model's file does not say (else {VOCABULARY})")
    add("--seq-len", type=int, metavar="N", help="tokens a sequence, if not as in the model's file")
    limits = parser.add_argument_group("what is searched (default: everything)")
    for name, what in (
        ("tp", "tensor-parallel degrees"),
        ("pp", "pipeline stages"),
        ("vpp", "chunks a stage"),
        ("mbs", "micro-batch sizes"),
        ("gas", "gradient accumulation steps"),
    ):
        limits.add_argument(f"--{name}", type=_list_of(int), metavar="N,...", help=what)
    limits.add_argument("--sequence", type=_list_of(_switch), metavar="on,off", help="sequence parallelism")
    limits.add_argument("--recompute", type=_list_of(_mode), metavar="none,pointwise,selective,full")
    limits.add_argument(
        "--zero", type=_list_of(int), metavar="N,...", help="ZeRO stages: 0, 1; of DeepSpeed 2 and 3 as well"
    )
    limits.add_argument("--unfused-attention", action="store_true", help="an attention that stores its scores")
    add("--top", type=int, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    add("--rejected", action="store_true", help="list each rejected layout with its numbers")
    add("--json", action="store_true", help="print one JSON object")
    add("--calibrate", type=Path, nargs="+", metavar="RUN", help="fit the efficiency to these run directories")
    add(
        "-o", "--output", type=Path, default=Path("calibration.yaml"), help="file of --calibrate (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan, or write a calibration."""
    if args.calibrate:
        from steerscale.cli.calibration import calibrate_from_runs

        given = args.gpu is not None or args.cluster is not None or args.calibration is not None
        machine = _machine(args, args.precision or "bf16", []) if given else None
        print(calibrate_from_runs(args.calibrate, machine=machine, output=args.output))
        return
    for key in ("model", "gpus", "global_batch_size"):
        if getattr(args, key) is None:
            raise ConfigError(
                f"--{key.replace('_', '-')} is missing: steerscale plan needs it, see steerscale plan --help"
            )
    if args.top < 0:
        raise ConfigError(f"--top must not be negative, got {args.top}")
    from steerscale.engines.config import EngineConfig
    from steerscale.planning.layouts import plan_layouts
    from steerscale.planning.report import format_plan
    from steerscale.planning.search import Search, Task

    assumptions: list[str] = []
    model = load_model(args.model, assumptions=assumptions, seq_len=args.seq_len, vocab_size=args.vocab_size)
    precision = args.precision or "bf16"
    task = Task(
        model=model,
        global_batch_size=args.global_batch_size,
        gpus=args.gpus,
        machine=_machine(args, precision, assumptions),
        engine=EngineConfig(name=args.engine, precision=precision, offload_optimizer=args.offload_optimizer),
        fused_attention=not args.unfused_attention,
    )
    search = Search(
        tensor=args.tp,
        pipeline=args.pp,
        virtual_pipeline=args.vpp,
        micro_batch_size=args.mbs,
        gradient_accumulation_steps=args.gas,
        sequence=args.sequence,
        recompute=args.recompute,
        zero=args.zero,
    )
    planned = plan_layouts(task, search)
    if not args.json:
        _print(format_plan(task, planned, top=args.top, rejected=args.rejected, assumptions=assumptions))
        return
    from steerscale.config import to_mapping

    answer: dict[str, Any] = {
        "model": to_mapping(model),
        "machine": to_mapping(task.machine),
        "gpus": args.gpus,
        "global_batch_size": args.global_batch_size,
        "engine": args.engine,
        "precision": precision,
        "assumptions": assumptions,
        "fitting": len(planned.plans),
        "plans": [plan.as_dict() for plan in planned.plans[: args.top]],
        "reasons": planned.reasons(),
    }
    if args.rejected:
        answer["rejections"] = [vars(entry) for entry in planned.rejections]
    _print(json.dumps(answer, indent=1))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at the end into a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_model(
    name: str,
    *,
    assumptions: list[str],
    seq_len: int | None = None,
    vocab_size: int | None = None,
    option: str = "--model",
) -> ModelConfig:
    """The model of a size of configs/model, a YAML file of model keys, or a run's config.yaml; `option` is who asks for it."""
    from steerscale.config import from_mapping, load_yaml

    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        path = MODELS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
        raise ConfigError(f"{option} {name}: {path} does not exist; name a file, or a size: {known or 'none found'}")
    content = load_yaml(path)
    if isinstance(content.get("model"), dict):
        content = content["model"]
    if seq_len is not None:
        content["seq_len"] = seq_len
    if vocab_size is not None:
        content["vocab_size"] = vocab_size
    elif content.get("vocab_size") is None:
        content["vocab_size"] = VOCABULARY
        assumptions.append(f"a vocabulary of {VOCABULARY:,} tokens (--vocab-size)")
    return from_mapping(ModelConfig, content, at="model")


def _machine(args: argparse.Namespace, precision: Any, assumptions: list[str]) -> "Machine":
    """The machine from --gpu, --cluster and --calibration; figures that nobody gave go into `assumptions`."""
    from dataclasses import replace

    from steerscale.planning.cluster import load_cluster
    from steerscale.planning.machine import machine_of, machine_of_cluster, read_calibration

    calibrated = read_calibration(args.calibration) if args.calibration is not None else None
    if args.cluster is not None:
        machine = machine_of_cluster(
            load_cluster(args.cluster), device=args.gpu, precision=precision, notes=assumptions
        )
    elif args.gpu is not None:
        machine = machine_of(args.gpu, precision=precision)
        assumptions.append(
            f"nodes of {machine.gpus_per_node} GPUs, {machine.intra_node_gb_per_second:g} GB/s within and "
            f"{machine.inter_node_gb_per_second:g} GB/s between them (--cluster knows better)"
        )
    elif calibrated is not None:
        return calibrated
    else:
        raise ConfigError("which GPUs? --gpu NAME, --cluster NAME, or --calibration FILE")
    if calibrated is not None:
        return replace(machine, efficiency=calibrated.efficiency)
    if not machine.name.startswith("a100") and "a100" not in (args.gpu or ""):
        assumptions.append("the efficiency of A100s, which these may not reach: --calibrate with a few measured runs")
    return machine


def _list_of(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        try:
            return [convert(item.strip()) for item in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a list like 1,2,4 or on,off, got {text!r}") from error

    return parse


def _switch(text: str) -> bool:
    if text not in ("on", "off", "true", "false"):
        raise ValueError(text)
    return text in ("on", "true")


def _mode(text: str) -> str:
    if text not in typing.get_args(Recompute):
        raise ValueError(text)
    return text
