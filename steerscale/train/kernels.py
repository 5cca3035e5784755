"""Whose kernels a run uses: its configuration and device, put to `accelerators.choose_kernels`."""

from dataclasses import replace

import torch

from steerscale.accelerators import TORCH, KernelChoice, choose_kernels, format_table, kernel_table
from steerscale.engines.fp8 import LEAST_CAPABILITY, Fp8
from steerscale.errors import ConfigError
from steerscale.train.config import RunConfig


def run_kernels(config: RunConfig, *, on_cuda: bool) -> KernelChoice:
    """The choice for the run that `config` describes. Raises ConfigError where it asks for what is not there."""
    engine = config.engine
    if engine.name == "deepspeed" and on_cuda:
        # torch's AdamW, and no fused layers: ZeRO takes their parameters apart in ways nobody has tried.
        layers = None if config.sae is not None else "torch"
        gated = layers if config.model.gated else None
        return replace(TORCH, norm=layers, linear=layers, attention=layers, activation=gated)
    if config.sae is not None:
        return choose_kernels(engine.kernels, on_cuda=on_cuda)
    choice = choose_kernels(
        engine.kernels,
        on_cuda=on_cuda,
        model=config.model,
        precision=engine.precision,
        documents=config.data is not None and config.data.reset_at_document_end,
        fp8=engine.fp8 != "none",
        compiled=engine.compile != "none",
    )
    if engine.fp8 != "none" and choice.linear != "te":
        raise ConfigError(
            f"engine.fp8={engine.fp8} needs Transformer Engine's linear layers on CUDA: engine.kernels=te says what is "
            "missing; or use engine.fp8=none"
        )
    return choice


def check_fp8_device(fp8: Fp8, device: torch.device) -> None:
    """Whether `device` can multiply in 8 bits. Raises ConfigError."""
    if fp8 == "none":
        return
    least = ".".join(map(str, LEAST_CAPABILITY))
    what = str(device) if device.type != "cuda" else torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < LEAST_CAPABILITY:
        has = "is no CUDA device" if capability is None else f"has {capability[0]}.{capability[1]}"
        raise ConfigError(
            f"engine.fp8={fp8} needs a CUDA device of compute capability {least} or later (H100, RTX 4090), and {what} {has}: "
            "use engine.fp8=none"
        )


def kernel_report(config: RunConfig, *, on_cuda: bool) -> str:
    """The table for console and run directory: what was found, and what of it this run uses."""
    table = format_table(kernel_table(run_kernels(config, on_cuda=on_cuda)))
    if config.sae is None:
        return table
    note = "SAEs have none of a GPT's layers (docs/sae.md: their kernels); the frozen language model runs on torch's."
    return f"{table}\n{note}"
