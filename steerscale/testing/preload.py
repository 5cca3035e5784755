"""Imported once in the fork server, so that every test rank starts with torch and Megatron-Core already loaded."""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import steerscale.engines.megatron
    import steerscale.models.gpt  # noqa: F401
