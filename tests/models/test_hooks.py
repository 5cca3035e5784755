"""Hooks see and replace the same activations on every layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steerscale.engines.megatron import MegatronEngine
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.hook_points import hook_point, hook_points
from steerscale.models.hooks import capture, hooked
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.models.gpts import GPT2, LLAMA, build_engine, build_random, infer

ATOL = 1e-5  # fp32; activations and logits are of order 1 to 10
MODELS = {"gpt2": GPT2, "llama": LLAMA}
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "TP2+SP": ParallelLayout(tensor=2, sequence=True),
    "PP2": ParallelLayout(pipeline=2),
    "PP2x2": ParallelLayout(pipeline=2, virtual_pipeline=2, gradient_accumulation_steps=2),
    "TP2xPP2": ParallelLayout(tensor=2, pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
}
ONE = ParallelLayout()


def batch(seed: int, model: ModelConfig) -> torch.Tensor:
    return torch.randint(model.tokens, (2, 8), generator=torch.Generator().manual_seed(seed))


def steering_vector(model: ModelConfig) -> torch.Tensor:
    return torch.linspace(-2.0, 2.0, model.d_model)


def zero(activation_BSM: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(activation_BSM)


def add(vector_M: torch.Tensor, activation_BSM: torch.Tensor) -> torch.Tensor:
    return activation_BSM + vector_M


def reverse(activation_BSM: torch.Tensor) -> torch.Tensor:
    """Moves activations over the sequence: only a whole one can be turned around."""
    return activation_BSM.flip(1)


def same(activation_BSM: torch.Tensor) -> torch.Tensor:
    return activation_BSM


PATCHES: dict[str, Callable[[ModelConfig], dict[str, Callable]]] = {
    "none": lambda model: {},
    "same": lambda model: dict.fromkeys(hook_points(model), same),
    "zero_mlp": lambda model: {"blocks.1.hook_mlp_out": zero},
    "zero_attention": lambda model: {"blocks.2.hook_attn_out": zero},
    "reverse_residual": lambda model: {"blocks.2.hook_resid_pre": reverse},
    # Block 1 is the last of its stage: what it returns is sent on.
    "steer": lambda model: {"blocks.1.hook_resid_post": partial(add, steering_vector(model))},
}


def observe(model: ModelConfig, layout: ParallelLayout) -> dict[str, Any]:
    """Everything the tests compare, from one rank: activations by hook point, logits by patch (last stage only)."""
    with initialize(layout) as context:
        engine = build_engine(model, context)
        chunks = engine.unwrapped

        def logits() -> np.ndarray | None:
            output = infer(chunks, batch(0, model))
            return None if output is None else output.numpy()

        with capture(chunks, hook_points(model)) as activations:
            logits()
        patched = {}
        for name, functions in PATCHES.items():
            with hooked(chunks, functions(model)):
                patched[name] = logits()
        patched["after"] = logits()
        return {
            "activations": {name: x_BSM.numpy() for name, x_BSM in activations.items()},
            "logits": {name: value for name, value in patched.items() if value is not None},
            "gradients": gradients(engine),
        }


def gradients(engine: MegatronEngine) -> dict[str, Any]:
    """Gradient norm of a training step with a patch, and the gradient of what the patch is made of."""
    model = engine.unwrapped[0].model
    vector = steering_vector(model).requires_grad_()

    def forward(tokens: torch.Tensor, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output = chunk(tokens, labels_BS=tokens.roll(-1, dims=1))

        def loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total, count = losses_BS.sum(), torch.tensor(losses_BS.numel())
            return total, count, torch.stack([total.detach(), count.float()])

        return output, loss

    def steer(activation_BSM: torch.Tensor) -> torch.Tensor:
        return 0.5 * activation_BSM + vector

    with hooked(engine.unwrapped, {"blocks.1.hook_resid_post": steer, "blocks.1.hook_mlp_out": reverse}):
        step = engine.train_step([batch(1, model), batch(2, model)], forward, lr=0.0)
    return {"norm": step.grad_norm, "vector": None if vector.grad is None else vector.grad.numpy()}


@pytest.fixture(scope="module", params=MODELS)
def reference(pool: RankPool, request: pytest.FixtureRequest) -> tuple[ModelConfig, dict[str, Any]]:
    model = MODELS[request.param]
    (result,) = pool.run(observe, model, ONE, ranks=1)
    return model, result


@pytest.fixture(scope="module", params=LAYOUTS)
def observed(
    pool: RankPool, reference: tuple[ModelConfig, dict[str, Any]], request: pytest.FixtureRequest
) -> tuple[ParallelLayout, dict[str, Any], list[dict[str, Any]]]:
    model, expected = reference
    layout = LAYOUTS[request.param]
    return layout, expected, pool.run(observe, model, layout, ranks=layout.world_size)


def test_one_process_activations_add_up(reference: tuple[ModelConfig, dict[str, Any]]) -> None:
    model, result = reference
    x = result["activations"]
    assert list(x) == hook_points(model)
    for layer in range(model.num_layers):
        block = f"blocks.{layer}"
        total = sum(x[f"{block}.{kind}"] for kind in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
        np.testing.assert_allclose(total, x[f"{block}.hook_resid_post"], atol=ATOL)
        if layer:
            np.testing.assert_array_equal(x[f"{block}.hook_resid_pre"], x[f"blocks.{layer - 1}.hook_resid_post"])
        for kind in ("hook_attn_out", "hook_mlp_out"):
            assert np.abs(x[f"{block}.{kind}"]).mean() > 0.01


def test_one_process_first_and_last_activation_belong_to_embedding_and_logits() -> None:
    model = GPT2
    with initialize(ONE) as context, torch.no_grad():
        (gpt,) = build_random(model, context)
        tokens = batch(0, model)
        with capture([gpt.eval()], ["blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"]) as activations:
            logits_SBV = gpt(tokens)
        embedding = gpt.embedding.word_embeddings.weight
        positions = gpt.embedding.position_embeddings.weight[:8]
        torch.testing.assert_close(activations["blocks.0.hook_resid_pre"], embedding[tokens] + positions)
        normed_BSM = gpt.decoder.final_layernorm(activations["blocks.3.hook_resid_post"])
        logits_BSV = F.linear(normed_BSM, embedding)[..., : model.tokens]
        torch.testing.assert_close(logits_BSV, logits_SBV.transpose(0, 1)[..., : model.tokens])


def test_one_process_patches(reference: tuple[ModelConfig, dict[str, Any]]) -> None:
    _, result = reference
    logits = result["logits"]
    np.testing.assert_array_equal(logits["same"], logits["none"])
    np.testing.assert_array_equal(logits["after"], logits["none"])
    for name in ("zero_mlp", "zero_attention", "reverse_residual", "steer"):
        assert np.abs(logits[name] - logits["none"]).max() > 0.05, name


def test_parity_activations(observed: tuple[ParallelLayout, dict[str, Any], list[dict[str, Any]]]) -> None:
    layout, expected, ranks = observed
    for rank, result in enumerate(ranks):
        for name, activation in result["activations"].items():
            np.testing.assert_allclose(activation, expected["activations"][name], atol=ATOL, err_msg=f"{rank} {name}")
    per_rank = len(expected["activations"]) // layout.pipeline
    assert [len(result["activations"]) for result in ranks] == [per_rank] * layout.world_size
    assert {name for result in ranks for name in result["activations"]} == set(expected["activations"])


def test_parity_patched_logits(observed: tuple[ParallelLayout, dict[str, Any], list[dict[str, Any]]]) -> None:
    layout, expected, ranks = observed
    for result in ranks[-layout.tensor :]:
        assert result["logits"].keys() == expected["logits"].keys()
        for name, logits in result["logits"].items():
            np.testing.assert_allclose(logits, expected["logits"][name], atol=ATOL, err_msg=name)
        np.testing.assert_array_equal(result["logits"]["same"], result["logits"]["none"])
        np.testing.assert_array_equal(result["logits"]["after"], result["logits"]["none"])


def test_parity_gradients_through_a_patch(
    observed: tuple[ParallelLayout, dict[str, Any], list[dict[str, Any]]],
) -> None:
    _, expected, ranks = observed
    vectors = [result["gradients"]["vector"] for result in ranks]
    owners = [vector for vector in vectors if vector is not None]
    assert owners
    for vector in owners:
        np.testing.assert_allclose(vector, expected["gradients"]["vector"], rtol=1e-4, atol=1e-4)
    for result in ranks:
        assert result["gradients"]["norm"] == pytest.approx(expected["gradients"]["norm"], rel=1e-5)


def test_hooks_nest_and_end_with_an_exception() -> None:
    def stop(activation_BSM: torch.Tensor) -> None:
        raise RuntimeError("stop")

    with initialize(ONE) as context, torch.no_grad():
        chunks = build_random(LLAMA, context)
        gpt = chunks[0].eval()
        tokens, point = batch(0, LLAMA), "blocks.2.hook_mlp_out"
        before = gpt(tokens)
        functions = {point: zero, "blocks.3.hook_resid_pre": stop}
        with pytest.raises(RuntimeError, match="stop"), hooked(chunks, functions), capture(chunks, [point]) as seen:
            gpt(tokens)
        assert torch.count_nonzero(seen[point]) == 0
        torch.testing.assert_close(gpt(tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [(2, 8), (1, 8), (2, 1)])
def test_neither_activation_nor_replacement_is_shared(model: ModelConfig, size: tuple[int, int]) -> None:
    """Megatron-Core adds in place during inference, and functions may write into what they are given."""
    with initialize(ONE) as context, torch.no_grad():
        chunks = build_random(model, context)
        gpt = chunks[0].eval()
        tokens = torch.zeros(size, dtype=torch.int64)
        before = gpt(tokens)
        constants = {name: torch.ones(*size, model.d_model) for name in hook_points(model)}
        with hooked(chunks, {name: lambda x, name=name: constants[name] for name in constants}):
            gpt(tokens)
        assert all(torch.equal(constant, torch.ones_like(constant)) for constant in constants.values())

        def scribble(activation_BSM: torch.Tensor) -> None:
            activation_BSM.zero_()

        with hooked(chunks, dict.fromkeys(hook_points(model), scribble)):
            torch.testing.assert_close(gpt(tokens), before, rtol=0, atol=0)


def test_replacement_of_another_shape_is_refused() -> None:
    with initialize(ONE) as context, torch.no_grad():
        chunks = build_random(GPT2, context)
        with (
            hooked(chunks, {"blocks.0.hook_resid_post": lambda x: x[:, 1:]}),
            pytest.raises(
                ConfigError, match=r"blocks\.0\.hook_resid_post returned shape \(2, 7, 24\), expected \(2, 8, 24\)"
            ),
        ):
            chunks[0](batch(0, GPT2))


def test_hook_points_are_named_over_the_whole_model() -> None:
    assert hook_points(GPT2)[:5] == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre",
    ]
    assert len(hook_points(GPT2)) == 16
    assert hook_point("blocks.3.hook_mlp_out", GPT2) == (3, "hook_mlp_out")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("blocks.1.hook_mlpout", "blocks.1.hook_mlp_out"), ("block.2.hook_resid_post", "blocks.2.hook_resid_post")],
)
def test_unknown_hook_point_is_refused_with_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"no hook point '{name}'.*did you mean '{suggestion}'"):
        hook_point(name, GPT2)


@pytest.mark.parametrize("name", ["blocks.4.hook_mlp_out", "blocks.01.hook_mlp_out", "blocks.-1.hook_mlp_out", "x", ""])
def test_hook_point_outside_the_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"blocks\.0 to blocks\.3 have"):
        hook_point(name, GPT2)
