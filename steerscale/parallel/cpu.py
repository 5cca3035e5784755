"""Megatron-Core without CUDA: redirect the devices it hard-codes.

Megatron-Core writes `device="cuda"`, `torch.cuda.current_device()` and `.cuda()` into schedules, gradient buffers, the
distributed optimizer, seeding and checkpoints. Where no CUDA exists, `redirect_cuda` sends all of that to the CPU (or to
the `meta` device, for dry runs that must not allocate), so laptops and CI run the code path that clusters run.

Nothing here can be active where CUDA exists: `redirect_cuda` raises there, before it has changed anything.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from steerscale.parallel.megatron import megatron_random

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
MKL_FUNCTIONS = (
    torch.exp,
    torch.expm1,
    torch.log,
    torch.log1p,
    torch.log2,
    torch.log10,
    torch.sin,
    torch.cos,
    torch.tan,
    torch.tanh,
    torch.sqrt,
    torch.erf,
    torch.erfc,
    torch.erfinv,
    torch.acos,
    torch.asin,
    torch.atan,
)
"""Those that torch may leave to MKL's vector library on a CPU."""
_FLOAT_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}


def cuda_is_available() -> bool:
    """The one question that decides between CUDA and the redirection."""
    return torch.cuda.is_available()


@functools.cache
def settle_vector_math() -> None:
    """Have MKL choose its vectorised exp, log and the like while there is one thread.

    It chooses at a function's first call. When two threads make that call at once, one of them may be served by a version of
    far lower accuracy, that once: in one of ten processes the first step's softmax was wrong by 1e-4 in half of its rows
    (torch 2.13), and that run was not the same, bit for bit, as the others.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in MKL_FUNCTIONS:
            function(one)


@contextlib.contextmanager
def redirect_cuda(to: str = "cpu") -> Iterator[None]:
    """Within this context everything Megatron-Core sends to "cuda" goes to the device `to` ("cpu" or "meta").

    Raises RuntimeError where CUDA is available: there is nothing to redirect, and doing so would be silent slowness.
    """
    if cuda_is_available():
        raise RuntimeError("CUDA is available: the CPU redirection must not be used")
    device = torch.device(to)
    _device_constructors()  # torch remembers these functions for `with torch.device(...)`: it must be the real ones
    with contextlib.ExitStack() as undo:
        for owner, name, value in _replacements(device):
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)  # inherited: what was covered comes to light again
            setattr(owner, name, value)
        random_log = logging.getLogger(megatron_random.__name__)
        random_log.addFilter(_expected_rng_change)
        undo.callback(random_log.removeFilter, _expected_rng_change)
        yield


def _redirected(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A torch function whose cuda device argument is replaced.

    Only functions that Megatron-Core gives a device to are wrapped: a `TorchFunctionMode` would catch all of them, but it
    costs every torch call a detour through Python, 3% of a step of a small model.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device
        return function(*args, **kwargs)

    return call


def _tensor_methods(device: torch.device) -> list[tuple[Any, str, Any]]:
    to, type_of = torch.Tensor.to, torch.Tensor.type

    def redirected_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (device, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device
        return to(self, *args, **kwargs)

    def gpu_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The distributed optimizer recognises parameters by the name of their CUDA tensor type.
        answer = type_of(self, *args, **kwargs)
        return _FLOAT_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    return [
        (torch.Tensor, "to", redirected_to),
        (torch.Tensor, "type", gpu_type),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
    ]


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """Stands in for a CUDA stream or event: on a CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Event(_Stream):
    """Another class, for the reason given below."""


def _replacements(device: torch.device) -> list[tuple[Any, str, Any]]:
    cuda = torch.cuda
    stream = _Stream()

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # A function of its own for every name: torch.compile looks functions up by identity and refuses one with two meanings.
    return [
        *((torch, name, _redirected(getattr(torch, name), device)) for name in _FACTORIES),
        *_tensor_methods(device),
        (cuda, "current_device", lambda: device),
        (cuda, "synchronize", lambda *args, **kwargs: None),
        (cuda, "set_device", lambda *args, **kwargs: None),
        (cuda, "empty_cache", lambda *args, **kwargs: None),
        (cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (cuda, "get_rng_state", get_rng_state),
        (cuda, "set_rng_state", set_rng_state),
        (cuda, "current_stream", lambda *args: stream),
        (cuda, "default_stream", lambda *args: stream),
        (cuda, "stream", lambda *args: stream),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (megatron_random, "_get_cuda_rng_state", get_rng_state),
        (megatron_random, "_set_cuda_rng_state", set_rng_state),
    ]


def _expected_rng_change(record: logging.LogRecord) -> bool:
    # With the redirection the "GPU" generator is the CPU generator: Megatron-Core's warning that it moved is no news.
    return "CPU RNG state changed" not in record.getMessage()
