"""steerscale: distributed training of language models and of the sparse autoencoders that explain and steer them.

The functions of `steerscale.api` are found here, as `steerscale.load_model(...)`; torch is imported when one is asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = ("load_model", "load_sae", "capture", "evaluate", "steer", "recipe", "effect", "generate", "close")


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module("steerscale.api"), name)
    raise AttributeError(f"module 'steerscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
