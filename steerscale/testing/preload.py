"""Imported once in the fork server, so that every test rank starts with torch and Megatron-Core already loaded."""

import steerscale.engines.megatron
import steerscale.models.gpt  # noqa: F401
