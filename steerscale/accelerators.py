"""Fused kernels found at run time: NVIDIA Apex, Transformer Engine, Liger, flash-attention. Never requirements.

PyPI's `apex` is a web toolkit of 2013, not NVIDIA's library; it is recognised and named.
"""

import importlib
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One library and what became of the search for it."""

    name: str
    found: bool
    note: str


_PROBES = {
    "Apex": ("apex", ("apex.optimizers", "apex.normalization")),
    "Transformer Engine": ("transformer_engine", ("transformer_engine.pytorch",)),
    "Liger": ("liger_kernel", ("liger_kernel.transformers",)),
    "flash-attention": ("flash_attn", ("flash_attn",)),
}


def find_accelerators() -> list[Accelerator]:
    """Look for each library's real modules."""
    return [_probe(name, package, modules) for name, (package, modules) in _PROBES.items()]


def _probe(name: str, package: str, modules: tuple[str, ...]) -> Accelerator:
    if importlib.util.find_spec(package) is None:
        return Accelerator(name, False, "not installed")
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        if package == "apex":
            note = "the `apex` installed is not NVIDIA's: `pip uninstall apex`, and build NVIDIA/apex from source if wanted"
            return Accelerator(name, False, note)
        return Accelerator(name, False, f"installed but broken: {error}")
    return Accelerator(name, True, "found")


def describe_accelerators() -> str:
    """One line for the start of a run."""
    return "; ".join(f"{accelerator.name}: {accelerator.note}" for accelerator in find_accelerators())
