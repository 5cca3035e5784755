"""Gradients that products add to a buffer."""

import pytest
import torch

from steerscale.models.functions import linear
from steerscale.parallel.main_grad import add_product, can_add

CPU = torch.device("cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_product_is_added() -> None:
    into, a, b = random(3, 5), random(3, 4), random(4, 5)
    expected = into + a @ b
    add_product(into, a, b)
    torch.testing.assert_close(into, expected)


def test_what_can_be_added() -> None:
    assert can_add(torch.float32, CPU)
    assert not can_add(torch.bfloat16, CPU), "torch has grown products of this kind on the CPU: use them"


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_micro_batches_add_up(bias: bool) -> None:
    weight, shift = random(6, 5).requires_grad_(), random(6).requires_grad_() if bias else None
    parameters = [weight] if shift is None else [weight, shift]
    inputs = [random(3, 2, 5).requires_grad_(), random(3, 2, 5).add(1).requires_grad_()]
    for x in inputs:
        torch.nn.functional.linear(x, weight, shift).square().sum().backward()
    expected = [tensor.grad for tensor in [*parameters, *inputs]]
    for tensor in [*parameters, *inputs]:
        tensor.grad = None
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    for x in inputs:
        linear(x, weight, shift, into_main_grad=True).square().sum().backward()
    assert weight.grad is None
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    found = [weight.main_grad, *(tensor.grad for tensor in [*parameters[1:], *inputs])]  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected)


def test_without_a_buffer_autograd_gets_the_gradient() -> None:
    weight, x = random(6, 5).requires_grad_(), random(4, 5)
    linear(x, weight, None, into_main_grad=True).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(6, 5))
