"""What is allowed but may not be meant: told before a run or in a plan, never refused."""

import os
from pathlib import Path

from launch.check import data_is_there
from launch.resume import resume_warnings
from steerscale.data.dataset import inspect_data
from steerscale.planning.memory import GIB, estimate_memory
from steerscale.train.config import RunConfig, total_samples


def warnings_about(config: RunConfig) -> list[str]:
    """Sentences for the user about a checked configuration."""
    return [
        *_schedule(config),
        *_data(config),
        *(resume_warnings(config) if config.launcher.name != "dry_run" else []),
        *(_memory(config) if config.launcher.name == "local" else []),
    ]


def _schedule(config: RunConfig) -> list[str]:
    optim, train, layout = config.optim, config.train, config.layout()
    warnings = []
    if optim.decay_steps is not None and optim.schedule == "constant":
        warnings.append(f"optim.decay_steps={optim.decay_steps} has no effect with optim.schedule=constant")
    ramp_up = train.ramp_up
    if ramp_up is not None and (total := total_samples(ramp_up, layout, train.steps)) < ramp_up.samples:
        warnings.append(
            f"train.ramp_up.samples={ramp_up.samples:,} is more than the {total:,} sequences of the whole run: it never "
            f"gets to the global batch size {layout.global_batch_size:,}"
        )
    return warnings


def _data(config: RunConfig) -> list[str]:
    if config.data is None or not data_is_there(config):
        return []
    manifests = inspect_data(config.data, seq_len=config.model.seq_len)
    known, asked = next(iter(manifests.values())).tokenizer.vocab_size, config.model.tokens
    warnings = []
    # Imported models have spare rows, a few hundred at most.
    if asked > known * 1.1:
        warnings.append(
            f"model.vocab_size={asked} is larger than the dataset's vocabulary of {known} tokens: {asked - known:,} rows of "
            "the embedding are never trained; leave it null to take the dataset's"
        )
    lacking = [path for path, manifest in manifests.items() if "valid" not in manifest.splits]
    if lacking and config.train.eval_interval:
        warnings.append(f"{', '.join(lacking)} has no split 'valid': nothing will be evaluated")
    return warnings


def _memory(config: RunConfig) -> list[str]:
    """Without GPUs all ranks share this machine's memory."""
    if has_gpu() or config.sae is not None:  # what SAEs take is not planned
        return []
    layout = config.layout()
    stages = [
        estimate_memory(config.model, layout, engine=config.engine, stage=stage) for stage in range(layout.pipeline)
    ]
    needed = sum(stage.total + stage.host for stage in stages) / GIB * layout.tensor * layout.data
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if needed <= there:
        return []
    return [
        f"the {layout.world_size} ranks need about {needed:,.1f} GiB together, this machine has {there:,.1f} GiB and no GPU: "
        "see launcher=dry_run for the parts"
    ]


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA device, told without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
