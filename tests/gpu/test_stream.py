"""Streaming on CUDA: passes beside training, buffers in either memory. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

from steerscale.parallel.context import initialize
from tests.activations.streams import EARLY, LATE, MODELS, ONE, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("buffer_device", ["device", "host"])
def test_cuda_overlap_changes_nothing(buffer_device: str, german_data: Path) -> None:
    """A stream whose passes run beside a busy main stream gives bit by bit what one without overlap gives."""
    hooks = [EARLY, LATE]
    with initialize(ONE) as context:
        assert context.device.type == "cuda"
        plain = build(german_data, MODELS["gpt2"], hooks, context, overlap=False)
        beside = build(german_data, MODELS["gpt2"], hooks, context, buffer_device=buffer_device)
        busy = torch.randn(2048, 2048, device="cuda")
        expected = [plain.next(64) for _ in range(40)]
        for want in expected:
            got = beside.next(64)
            busy = torch.tanh(
                busy @ busy
            )  # the work of a step, which the next passes must neither wait for nor overtake
            assert torch.equal(got.ids, want.ids)
            for hook in hooks:
                assert got.activations[hook].is_cuda
                assert torch.equal(got.activations[hook], want.activations[hook])
