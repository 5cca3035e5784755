import math

import pytest
import torch

from steerscale.errors import ConfigError
from steerscale.sampling import generate, next_token_distribution

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))


def test_distribution_without_filters_is_softmax() -> None:
    assert torch.allclose(next_token_distribution(LOGITS), torch.tensor([0.1, 0.5, 0.15, 0.25]))


def test_distribution_temperature_divides_logits() -> None:
    got = next_token_distribution(LOGITS, temperature=0.5)
    squares = torch.tensor([0.01, 0.25, 0.0225, 0.0625])
    assert torch.allclose(got, squares / squares.sum())


def test_distribution_zero_temperature_is_greedy() -> None:
    assert next_token_distribution(LOGITS, temperature=0.0).tolist() == [0, 1, 0, 0]


def test_distribution_top_k_keeps_the_k_most_probable() -> None:
    assert torch.allclose(next_token_distribution(LOGITS, top_k=2), torch.tensor([0, 2 / 3, 0, 1 / 3]))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_distribution_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    got = next_token_distribution(LOGITS, top_p=top_p)
    assert got.nonzero().flatten().tolist() == kept
    assert got.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_distribution_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        next_token_distribution(LOGITS, **wrong)  # type: ignore[arg-type]


class Successor(torch.nn.Module):
    """Stands in for a GPT over digits: after n surely comes n + 1 mod 10, whatever came before."""

    class model:
        seq_len, tokens = 4, 10

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.longest = 0

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, tokens_BS.shape[1])
        next_BS = (tokens_BS + 1) % 10
        return torch.where(torch.nn.functional.one_hot(next_BS.T, 12).bool(), 0.0, -math.inf)


def test_generate_continues_stops_at_eos_and_looks_back_seq_len() -> None:
    model = Successor()
    tokens = list(generate(model, [3], max_tokens=20, eos_id=9))  # type: ignore[arg-type]
    assert tokens == [4, 5, 6, 7, 8, 9]
    assert model.longest == 4


def test_generate_counts_tokens_and_needs_a_prompt() -> None:
    assert len(list(generate(Successor(), [3], max_tokens=5))) == 5  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(generate(Successor(), [], max_tokens=1))  # type: ignore[arg-type]


def test_generate_repeats_with_the_same_seed() -> None:
    class Uniform(Successor):
        def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
            return torch.zeros(tokens_BS.shape[1], 1, 12)

    def draw(seed: int) -> list[int]:
        return list(generate(Uniform(), [0], max_tokens=30, seed=seed))  # type: ignore[arg-type]

    assert draw(1) == draw(1) != draw(2)
    assert max(draw(1)) < 10, "columns that pad the vocabulary must never be drawn"
