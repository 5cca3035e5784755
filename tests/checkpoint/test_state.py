"""Optimizers that keep their state otherwise than torch's AdamW: NVIDIA's fused ones, which only exist on GPUs."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from steerscale.checkpoint.fragments import FragmentReader, write_fragments, write_index
from steerscale.engines.state import load_fragments, owned_ranges, set_steps, state_fragments
from steerscale.parallel.shards import Shard


class FusedAdam:
    """As NVIDIA's: no state before the first step, one count of steps for each group, made at the first step."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [parameter], "lr": 1.0}]
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    def step(self) -> None:
        """Not Adam, but as sensitive to its state."""
        (group,) = self.param_groups
        group["step"] = group["step"] + 1 if "step" in group else 1
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["exp_avg"] += 1.0
            state["exp_avg_sq"] += 2.0
            parameter.data += group["step"] * state["exp_avg"]


CONTEXT: Any = SimpleNamespace(layout=SimpleNamespace(tensor=1, data=1), at=SimpleNamespace(tensor=0, data=0))


def _build() -> tuple[list[tuple[Shard, torch.nn.Parameter]], FusedAdam, Any]:
    parameter = torch.nn.Parameter(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    adam = FusedAdam(parameter)
    whole = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)])
    return [(Shard(name="w", dim=None), parameter)], adam, whole


def test_moments_are_there_before_the_first_step() -> None:
    shards, _, optimizer = _build()
    (owned,) = owned_ranges(optimizer).values()
    assert (owned.start, owned.stop) == (0, 6)
    assert torch.equal(owned.tensors["exp_avg"], torch.zeros(2, 3))
    assert owned.tensors["weight"].data_ptr() == shards[0][1].data_ptr()


def test_fused_optimizer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    shards, adam, optimizer = _build()
    for _ in range(3):
        adam.step()
    fragments = state_fragments(shards, owned_ranges(optimizer), CONTEXT, distributed=False)
    write_index(write_fragments(fragments, tmp_path / "rank_00000.safetensors"), tmp_path)
    resumed_shards, resumed, resumed_optimizer = _build()
    load_fragments(resumed_shards, owned_ranges(resumed_optimizer), CONTEXT, FragmentReader(tmp_path))
    set_steps(resumed_optimizer, 3)
    for one in (adam, resumed):
        one.step()
    assert torch.equal(resumed_shards[0][1], shards[0][1])
    assert resumed.param_groups[0]["step"] == adam.param_groups[0]["step"] == 4
