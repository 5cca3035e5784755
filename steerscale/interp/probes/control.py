"""Control tasks: what a probe learns by heart (Hewitt, Liang 2019).

Each word type gets one label at random, the same in training and held-out text, drawn from the real labels' frequencies.
Held-out accuracy on that can only come from knowing word types. Selectivity is the real task's accuracy minus the control's.
"""

import random
from collections.abc import Sequence

import torch


def control_labels(types: Sequence[str], counts_C: torch.Tensor, *, seed: int) -> torch.Tensor:
    """int64 [V]: a label for each of V places by its type, an index into `counts_C`, the labels' frequencies [C]."""
    weights = counts_C.tolist()
    numbers = range(len(weights))
    drawn = {name: random.Random(f"{seed}:{name}").choices(numbers, weights)[0] for name in sorted(set(types))}
    return torch.tensor([drawn[name] for name in types], dtype=torch.int64)
