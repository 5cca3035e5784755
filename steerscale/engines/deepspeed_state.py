"""Where DeepSpeed's optimizers keep weights and moments, as ranges of our parameters.

No ZeRO: whole parameters. ZeRO-1 and 2: each replica owns a range of the flattened concatenation of all parameters of a group;
DeepSpeed records which part of which parameter lies where (`_hp_mapping`). ZeRO-3: each replica owns an equal part of each
flattened parameter, the last one padded.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from steerscale.engines.deepspeed_adam import create_state
from steerscale.engines.state import MOMENTS, OwnedRange


def basic_adam(optimizer: Any) -> torch.optim.Optimizer:
    """torch's AdamW inside a DeepSpeed optimizer."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def prepare_state(optimizer: Any) -> None:
    """Create the optimizer's state."""
    adam = basic_adam(optimizer)
    create_state(adam, _flat(optimizer) or [p for group in adam.param_groups for p in group["params"]])


def _flat(optimizer: Any) -> list[torch.Tensor]:
    """The flat float32 weights of each group that this rank updates; none without ZeRO."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def owned_ranges(optimizer: Any, parameters: Iterable[torch.nn.Parameter]) -> dict[torch.nn.Parameter, OwnedRange]:
    """Every parameter of which this rank holds optimizer state. The tensors are the optimizer's own, not copies."""
    adam, flat = basic_adam(optimizer), _flat(optimizer)
    owned = {}
    for parameter in parameters:
        if not flat:
            state = adam.state[parameter]
            tensors = {"weight": parameter.data, **{name: state[name] for name in MOMENTS}}
            owned[parameter] = OwnedRange(start=0, stop=parameter.numel(), tensors=tensors)
            continue
        place = _place_3(optimizer, parameter) if hasattr(parameter, "ds_id") else _place(parameter)
        if place is None:
            continue
        number, at, start, stop = place
        main = flat[number]
        whole = {"weight": main.data, **{name: adam.state[main][name] for name in MOMENTS}}
        tensors = {kind: tensor.narrow(0, at, stop - start) for kind, tensor in whole.items()}
        owned[parameter] = OwnedRange(start=start, stop=stop, tensors=tensors)
    return owned


def _place(parameter: Any) -> tuple[int, int, int, int] | None:
    """(group, first element in it, first and last element of the parameter) under ZeRO-1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return mapping.param_group_index, there.start, here.start, here.start + here.numel


def _place_3(optimizer: Any, parameter: Any) -> tuple[int, int, int, int] | None:
    number, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * size
    stop = min(start + size, parameter.ds_numel)
    return (number, at, start, stop) if start < stop else None


def set_steps(optimizer: Any, steps: int) -> None:
    """Tell AdamW how many updates it has applied."""
    for state in basic_adam(optimizer).state.values():
        state["step"].fill_(steps)
