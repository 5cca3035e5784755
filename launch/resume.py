"""Starting again in a run directory: what is refused, and what is allowed but changes what is being resumed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from steerscale.errors import ConfigError, SteerscaleError
from steerscale.rundir import read_config
from steerscale.sae.config import specs_of
from steerscale.train.config import FREE_MODEL_KEYS, RunConfig

OTHER_ORDER = "training goes on at the same position of another order of samples: some may come twice, some never"
MEANINGS = {
    "seed": OTHER_ORDER,
    "data": OTHER_ORDER,
    "data.skip": OTHER_ORDER,
    "data.random_offset": OTHER_ORDER,
    "data.reset_at_document_end": "the same samples are read in another way from here",
    "data.mask_document_end": "the same samples are read in another way from here",
    "parallel.global_batch_size": "the same samples follow, grouped into other steps",
    "train.ramp_up": "the same samples follow, grouped into other steps",
}
"""What decides which samples a step reads -> what a change means for a run that goes on."""


def check_same_model(config: RunConfig) -> None:
    """Raise ConfigError if the run directory holds checkpoints of another model."""
    state = newest_state(Path(config.run_dir))
    there = (state or {}).get("model")
    if not isinstance(there, Mapping):
        return
    at, now, keys = "model", asdict(config.model), list(there)
    if config.sae is not None:
        specs = specs_of(config.sae, _widths(config, state or {}))
        at, now = "sae", {spec.name: spec.shape for spec in specs}
        keys = list(dict.fromkeys([*there, *now]))  # one SAE more is another run as well
    differing = [
        f"{at}.{key} was {_yaml(there.get(key))}, is {_yaml(now.get(key))}"
        for key in keys
        if now.get(key) != there.get(key) and key not in FREE_MODEL_KEYS
    ]
    if differing:
        raise ConfigError(
            f"run_dir={config.run_dir} holds checkpoints of another model ({'; '.join(differing)}): choose another run_dir "
            "or name, or go on with the model as it was"
        )


def _widths(config: RunConfig, state: Mapping[str, Any]) -> dict[str, int]:
    """Of the hook points' activations. Those of a transformers model's modules only the ranks find out: as they were found."""
    assert config.sae is not None
    assert config.stream is not None
    widths = dict.fromkeys(config.sae.all_hooks, config.model.d_model)
    if config.stream.lm_kind == "transformers":
        for spec in (state.get("sae") or {}).values():
            for hooks, width in ((spec["inputs"], spec["d_in"]), (spec["outputs"], spec["d_out"])):
                # Of a crosscoder the sum is what counts.
                each = width // len(hooks)
                widths |= {**dict.fromkeys(hooks, each), hooks[-1]: width - each * (len(hooks) - 1)}
    return widths


def resume_warnings(config: RunConfig) -> list[str]:
    """What differs from the earlier start in the same run directory and changes the meaning of going on."""
    run_dir = Path(config.run_dir)
    state = newest_state(run_dir)
    if state is None:
        return []  # nothing to resume
    try:
        before, after = _facts(read_config(run_dir)), _facts(asdict(config))
    except SteerscaleError:
        return [f"{run_dir / 'config.yaml'} cannot be read: whether seed, data or batch changed is unknown"]
    step = (state.get("progress") or {}).get("step")
    warnings = [
        f"run_dir={run_dir} goes on from step {step} with {after[key]}, before it was {before[key]}: {meaning}"
        for key, meaning in MEANINGS.items()
        if before[key] != after[key]
    ]
    if isinstance(step, int) and step >= config.train.steps:
        warnings.append(
            f"run_dir={run_dir} stands at step {step} already, train.steps={config.train.steps}: nothing is left to do; "
            "raise train.steps to train on, or choose another run_dir or name"
        )
    return warnings


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """state.json of the newest checkpoint; None if there is none, or it is damaged: the workers say so and use an older."""
    states = sorted((run_dir / "checkpoints").glob("step_*/state.json"))
    if not states:
        return None
    try:
        state = json.loads(states[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _facts(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys of MEANINGS with their values, as people write them. An older version's `config` may lack some."""
    data, batch, train = (config.get(key) or {} for key in ("data", "parallel", "train"))
    size = batch.get("global_batch_size")
    if size is None:
        size = batch.get("micro_batch_size", 1) * batch.get("data", 1) * (batch.get("gradient_accumulation_steps") or 1)
    facts = {
        "seed": config.get("seed"),
        "data.skip": data.get("skip", []),
        "data.random_offset": data.get("random_offset", True),
        "data.reset_at_document_end": data.get("reset_at_document_end", False),
        "data.mask_document_end": data.get("mask_document_end", False),
        "parallel.global_batch_size": size,
        "train.ramp_up": train.get("ramp_up"),
    }
    blend = data.get("blend")
    datasets = f"data.blend={_yaml(blend)}" if blend else f"data.path={data.get('path')}"
    return {**{key: f"{key}={_yaml(value)}" for key, value in facts.items()}, "data": datasets}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("\n...\n").strip()
