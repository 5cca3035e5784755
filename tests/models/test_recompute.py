"""What a layer keeps for its backward pass: as much as the planner says, and computed again the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steerscale.accelerators import TORCH
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, rotary_table, transformer_config
from steerscale.models.layer import compile_layers
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.memory import layer_activation_bytes
from tests.models.gpts import GPT2, LLAMA

LAYOUT = ParallelLayout(micro_batch_size=2)
MODELS = {
    "gpt2": replace(GPT2, d_model=128, seq_len=64),
    "llama": replace(LLAMA, d_model=128, num_heads=8, num_kv_groups=2, d_head=16, d_ff=320, seq_len=64),
}
ATTENTION = {"torch": TORCH, "native": replace(TORCH, attention="native")}


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Allocated(TorchDispatchMode):
    """Follows the memory that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        """What is still there."""
        return sum(size for storage, size in self._storages.values() if not storage.expired())


def forward(model: ModelConfig, context: ParallelContext, **settings: Any) -> tuple[GPT, torch.Tensor, int]:
    """A chunk, its losses, and how many bytes of the forward pass remain."""
    chunk = GPT(model, transformer_config(model, context, **settings), context)
    initialize_parameters([chunk], context, seed=3)
    tokens = torch.randint(0, model.tokens, (2, model.seq_len + 1), generator=torch.Generator().manual_seed(0))
    with Allocated() as allocated:
        losses = chunk.train()(tokens[:, :-1], None, None, tokens[:, 1:])
    return chunk, losses, allocated.bytes


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("recompute", ["none", "pointwise", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_keeps_what_the_planner_says(name: str, recompute: Any, attention: str) -> None:
    model = MODELS[name]
    with initialize(LAYOUT) as context:
        one, three = (
            forward(replace(model, num_layers=layers), context, recompute=recompute, kernels=ATTENTION[attention])[2]
            for layers in (1, 3)
        )
    planned = layer_activation_bytes(model, LAYOUT, precision="fp32", recompute=recompute)
    if attention == "torch" and recompute != "full":
        # Its kernel on the CPU gives [B, S, H, D], the matrix behind it takes [S, B, H D]: there are two of it.
        planned += 4 * LAYOUT.micro_batch_size * model.seq_len * model.num_heads * model.head_width
    assert (three - one) / 2 == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_again_is_the_same(name: str) -> None:
    gradients: list[dict[str, Any]] = []
    with initialize(LAYOUT) as context:
        for recompute in ("none", "pointwise"):
            chunk, losses, _ = forward(MODELS[name], context, recompute=recompute)
            losses.sum().backward()
            gradients.append({name: parameter.grad for name, parameter in chunk.named_parameters()})
    kept, again = gradients
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("recompute", ["none", "pointwise"])
def test_compiled_layers_keep_what_the_planner_says(recompute: Any) -> None:
    model = MODELS["llama"]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with initialize(LAYOUT) as context:
        chunk, _, _ = forward(replace(model, num_layers=2), context, recompute=recompute, kernels=ATTENTION["native"])
        parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        compile_layers([chunk], torch.device("cpu"))
        hidden = torch.randn(model.seq_len, LAYOUT.micro_batch_size, model.d_model, requires_grad=True)
        positions = torch.arange(model.seq_len).unsqueeze(0)
        rotation = rotary_table(positions, model.head_width, model.rope_theta, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk.decoder.layers[0](hidden, None, rotary_pos_emb=rotation)
    planned = layer_activation_bytes(model, LAYOUT, precision="fp32", recompute=recompute)
    assert sum(kept.values()) == pytest.approx(planned, rel=0.03)
