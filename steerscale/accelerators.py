"""Fused kernels found at run time: NVIDIA Apex, Transformer Engine, Liger, flash-attention. Never requirements.

`engine.kernels` says whose fused AdamW the Megatron engine steps with; all else is torch's own fused kernels, which need no
library. PyPI's `apex` is a web toolkit of 2013, not NVIDIA's library; it is recognised and named.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from steerscale.errors import ConfigError

Kernels = Literal["auto", "torch", "apex", "te"]
"""auto: the first of te, apex, torch that can run here."""


@dataclass(frozen=True)
class Accelerator:
    """One library and what became of the search for it."""

    name: str
    found: bool
    note: str
    use: str = ""
    """What a run uses it for; empty: nothing."""


_PROBES = {
    "Apex": ("apex", ("apex.optimizers", "apex.normalization")),
    "Transformer Engine": ("transformer_engine", ("transformer_engine.pytorch",)),
    "Liger": ("liger_kernel", ("liger_kernel.transformers",)),
    "flash-attention": ("flash_attn", ("flash_attn",)),
}
_ADAMS = {
    "te": ("Transformer Engine", "transformer_engine.pytorch.optimizers", "FusedAdam"),
    "apex": ("Apex", "apex.optimizers", "FusedAdam"),
    "torch": ("torch", "torch.optim", "AdamW"),
}
TORCH_USES = "scaled_dot_product_attention, fused norms"


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


def choose_kernels(wish: Kernels, *, on_cuda: bool) -> Literal["torch", "apex", "te"]:
    """Whose fused AdamW steps. Raises ConfigError if the library asked for is not there, or runs on no such device."""
    if wish == "torch" or (wish == "auto" and not on_cuda):
        return "torch"
    found = {accelerator.name: accelerator for accelerator in find_accelerators()}
    if wish == "auto":
        for choice in ("te", "apex"):
            if found[_ADAMS[choice][0]].found:
                return choice
        return "torch"
    accelerator = found[_ADAMS[wish][0]]
    if not accelerator.found:
        raise ConfigError(
            f"engine.kernels={wish} needs {accelerator.name}: {accelerator.note}; install it, or use engine.kernels=auto"
        )
    if not on_cuda:
        raise ConfigError(
            f"engine.kernels={wish}: {accelerator.name}'s kernels run on CUDA only; use engine.kernels=auto"
        )
    return wish


def adam_class(choice: Literal["torch", "apex", "te"]) -> Any:
    """The AdamW of a choice: `torch.optim.AdamW`, or a FusedAdam with decoupled weight decay."""
    _, module, name = _ADAMS[choice]
    return getattr(importlib.import_module(module), name)


def kernel_table(choice: Literal["torch", "apex", "te"] | None) -> list[Accelerator]:
    """What was found, torch first, and what a run with this choice uses each for; None: the engine has an AdamW of its own."""
    library = _ADAMS[choice][0] if choice is not None else None
    adam = "fused AdamW"
    rows = [Accelerator("torch", True, "found", ", ".join([*([adam] if choice == "torch" else []), TORCH_USES]))]
    return rows + [
        Accelerator(one.name, one.found, one.note, adam if one.name == library else "") for one in find_accelerators()
    ]


def format_table(rows: list[Accelerator]) -> str:
    """The table in lines: library, what became of the search, what it is used for."""
    cells = [("library", "", "used for"), *((row.name, row.note, row.use or "-") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
