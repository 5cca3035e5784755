"""Fused kernels found at run time: NVIDIA Apex, Transformer Engine, Liger, flash-attention. Never requirements.

`choose_kernels` is the one place where `engine.kernels`, the device, the model and what is installed become a choice by
component; engines and layers do as the choice says (docs/kernels.md). Torch-free until something is looked for.
"""

import importlib
import importlib.util
import inspect
from dataclasses import dataclass, fields
from typing import Any, Literal

from steerscale import native
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig

Kernels = Literal["auto", "torch", "apex", "te", "liger"]
"""What `engine.kernels` may say. auto: by component, the best that is there and runs on this device."""
Library = Literal["torch", "apex", "te", "liger", "flash", "native"]
"""native: compiled from C++ of our own."""
MAX_HEAD_WIDTH = 256
"""The widest head of flash-attention's kernels."""
NATIVE_HEAD_WIDTHS = 16
"""Widths of heads that `native/attention.cpp` takes are multiples of this."""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Whose kernel each component of a run uses; None: the run has no such component, or its engine brings its own."""

    adam: Library | None = "torch"
    norm: Library | None = "torch"
    linear: Library | None = "torch"
    attention: Library | None = "torch"
    activation: Library | None = "torch"
    """The gated activation."""
    varlen: bool = False
    """Documents are kept apart by a kernel that takes where they begin, not by a mask of S x S."""


TORCH = KernelChoice()
"""torch's own kernels for everything: what runs on every device."""

_COMPONENTS = {
    "adam": "fused AdamW",
    "norm": "norms",
    "linear": "linear layers",
    "attention": "attention",
    "activation": "gated activation",
}


@dataclass(frozen=True)
class Accelerator:
    """One library and what became of the search for it."""

    name: str
    found: bool
    note: str
    use: str = ""
    """What a run uses it for; empty: nothing."""


_NAMES: dict[Library, str] = {
    "apex": "Apex",
    "te": "Transformer Engine",
    "liger": "Liger",
    "flash": "flash-attention",
}
# Package, and the names that are used of it. Apex without its CUDA extensions imports well and fails at the first call.
_PROBES: dict[Library, tuple[str, tuple[str, ...]]] = {
    "apex": (
        "apex",
        (
            "apex.optimizers",
            "apex.normalization.fused_layer_norm:fused_rms_norm_affine",
            "amp_C",
            "fused_layer_norm_cuda",
        ),
    ),
    "te": ("transformer_engine", ("transformer_engine.pytorch",)),
    "liger": (
        "liger_kernel",
        (
            "liger_kernel.ops.rms_norm:LigerRMSNormFunction",
            "liger_kernel.ops.layer_norm:LigerLayerNormFunction",
            "liger_kernel.ops.swiglu:LigerFusedGateUpSiLUMulFunction",
        ),
    ),
    "flash": ("flash_attn", ("flash_attn:flash_attn_varlen_func",)),
}
_ADAMS = {
    "te": ("transformer_engine.pytorch.optimizers", "FusedAdam"),
    "apex": ("apex.optimizers", "FusedAdam"),
    "torch": ("torch.optim", "AdamW"),
}


def find_accelerators() -> list[Accelerator]:
    """Look for each library by the names that are used of it."""
    return [_probe(library) for library in _PROBES]


def _probe(library: Library) -> Accelerator:
    name, (package, wanted) = _NAMES[library], _PROBES[library]
    if importlib.util.find_spec(package) is None:
        return Accelerator(name, False, "not installed")
    try:
        for one in wanted:
            module, _, attribute = one.partition(":")
            imported = importlib.import_module(module)
            if attribute:
                getattr(imported, attribute)
    except (ImportError, AttributeError, OSError) as error:
        return Accelerator(name, False, _why_not(package, error))
    return Accelerator(name, True, "found")


def _why_not(package: str, error: Exception) -> str:
    if package != "apex":
        return f"installed but not usable, too old or broken: {error}"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "the `apex` installed is not NVIDIA's: `pip uninstall apex`, and build NVIDIA/apex from source if wanted"
    return f"NVIDIA's, but built without its CUDA extensions (--cpp_ext --cuda_ext), or broken: {error}"


def choose_kernels(
    wish: Kernels,
    *,
    on_cuda: bool,
    model: ModelConfig | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    documents: bool = False,
    fp8: bool = False,
    compiled: bool = False,
) -> KernelChoice:
    """Whose kernels a run uses.

    Args:
        wish: `engine.kernels`.
        model: the GPT that is trained; None: what is trained has none of its layers (an SAE), AdamW alone is chosen.
        documents: attention stays within documents (data.reset_at_document_end).
        fp8: the linear layers multiply in fp8.
        compiled: blocks go through torch.compile, which fuses torch's norms with their neighbours and must stop at others'.

    Raises:
        ConfigError: the library asked for is not there, or runs on no such device.
    """
    found = _usable(wish, on_cuda=on_cuda)

    def first(*libraries: Library) -> Library:
        for library in libraries:
            if library in found:
                return library
        return "torch"

    adam = first("te", "apex")
    if model is None:
        return KernelChoice(adam=adam, norm=None, linear=None, attention=None, activation=None)
    half = precision != "fp32"
    # Dropout of attention draws from Megatron-Core's generators, one a tensor rank: torch's attention does that.
    fused = half and not model.attention_dropout and model.head_width % 8 == 0 and model.head_width <= MAX_HEAD_WIDTH
    # `torch` stays with the mask, which no kernel's fault can touch: what the others are compared with.
    varlen = documents and fused and on_cuda and wish != "torch" and ("flash" in found or torch_has_varlen())
    leave_to_compiler = compiled and wish == "auto"
    on_cpu = wish == "auto" and not on_cuda and not half
    pointwise: Library = "torch"
    if on_cpu and not compiled and native.pointwise_library() is not None:
        pointwise = "native"
    norm = pointwise if on_cpu and model.norm == "rmsnorm" else first("te", "apex", "liger")
    attention: Library = "torch"
    if varlen:
        attention = first("flash")
    elif fused and not documents and not leave_to_compiler:
        attention = first("te")
    elif on_cpu and not documents and _has_native_attention(model):
        attention = "native"
    return KernelChoice(
        adam=adam,
        norm="torch" if leave_to_compiler else norm,
        # In 32 bits Transformer Engine multiplies in TF32, asked or not. In 16 bits its products are cuBLAS's as torch's are:
        # auto takes them for fp8 alone.
        linear=first("te") if half and (fp8 or wish == "te") else "torch",
        attention=attention,
        # Megatron-Core compiles torch's gated activation into one kernel already: auto has nothing to gain.
        activation=None if not model.gated else first("liger") if wish == "liger" else pointwise,
        varlen=varlen,
    )


def _usable(wish: Kernels, *, on_cuda: bool) -> set[Library]:
    """Libraries that may be chosen from. flash-attention comes with every wish but torch: it competes with none of them."""
    if wish == "torch" or (wish == "auto" and not on_cuda):
        return set()
    there: set[Library] = {library for library in _PROBES if _probe(library).found}
    if wish == "auto":
        return there
    name = _NAMES[wish]
    if wish not in there:
        raise ConfigError(
            f"engine.kernels={wish} needs {name}: {_probe(wish).note}; install it, or use engine.kernels=auto"
        )
    if not on_cuda:
        raise ConfigError(f"engine.kernels={wish}: {name}'s kernels run on CUDA only; use engine.kernels=auto")
    return there & {wish, "flash"}


def _has_native_attention(model: ModelConfig) -> bool:
    fits = not model.attention_dropout and model.head_width % NATIVE_HEAD_WIDTHS == 0
    return fits and native.attention_library() is not None


def torch_has_varlen() -> bool:
    """Whether this torch has attention over sequences of various lengths, with the arguments that are used here."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:  # before 2.10
        return False
    arguments = inspect.signature(module.varlen_attn).parameters
    return "window_size" in arguments and "enable_gqa" in arguments


def adam_class(library: Library | None) -> Any:
    """The AdamW of a library: `torch.optim.AdamW`, or a FusedAdam with decoupled weight decay."""
    module, name = _ADAMS[library or "torch"]
    return getattr(importlib.import_module(module), name)


def kernel_table(choice: KernelChoice) -> list[Accelerator]:
    """What was found, torch first, and what a run with this choice uses each for."""
    uses: dict[Library, list[str]] = {}
    for field in fields(choice):
        library = getattr(choice, field.name)
        if field.name in _COMPONENTS and library is not None:
            uses.setdefault(library, []).append(_use(field.name, library, choice))
    rows = [Accelerator("torch", True, "found", ", ".join(uses.get("torch", [])))]
    if "native" in uses:
        rows.append(Accelerator("steerscale", True, "compiled", ", ".join(uses["native"])))
    for library in _PROBES:
        one = _probe(library)
        rows.append(Accelerator(one.name, one.found, one.note, ", ".join(uses.get(library, []))))
    return rows


def _use(component: str, library: Library, choice: KernelChoice) -> str:
    if component != "attention":
        return _COMPONENTS[component]
    if choice.varlen:
        return "attention within documents (varlen)"
    return "attention (scaled_dot_product_attention)" if library == "torch" else "attention"


def format_table(rows: list[Accelerator]) -> str:
    """The table in lines: library, what became of the search, what it is used for."""
    cells = [("library", "", "used for"), *((row.name, row.note, row.use or "-") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
