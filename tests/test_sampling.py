"""Distributions of the next token: the textbook cases, and transformers' own filters with the same settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steerscale.errors import ConfigError
from steerscale.sampling import GREEDY, Choice, Sampling, next_token_distribution

LOGITS = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))


def distribution(**settings: Any) -> torch.Tensor:
    return next_token_distribution(LOGITS, Sampling(**settings))[0]


def test_distribution_without_filters_is_softmax() -> None:
    assert torch.allclose(distribution(), torch.tensor([0.1, 0.5, 0.15, 0.25]))


def test_distribution_temperature_divides_logits() -> None:
    squares = torch.tensor([0.01, 0.25, 0.0225, 0.0625])
    assert torch.allclose(distribution(temperature=0.5), squares / squares.sum())


def test_distribution_zero_temperature_is_greedy() -> None:
    assert distribution(temperature=0.0).tolist() == [0, 1, 0, 0]


def test_distribution_top_k_keeps_the_k_most_probable() -> None:
    assert torch.allclose(distribution(top_k=2), torch.tensor([0, 2 / 3, 0, 1 / 3]))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, [1]), (0.49, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-9, [1])],
)
def test_distribution_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    got = distribution(top_p=top_p)
    assert got.nonzero().flatten().tolist() == kept
    assert got.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.4, [1, 3]), (1.0, [1])])
def test_distribution_min_p_is_relative_to_the_most_probable(min_p: float, kept: list[int]) -> None:
    assert distribution(min_p=min_p).nonzero().flatten().tolist() == kept


def test_repetition_penalty_lowers_what_was_there_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    got = next_token_distribution(logits, Sampling(repetition_penalty=2.0), texts=[[0, 1, 1]])
    assert torch.allclose(got, torch.tensor([[1.0, -4.0, 1.0, -1.0]]).softmax(dim=-1))
    greedy = next_token_distribution(logits, replace(GREEDY, repetition_penalty=3.0), texts=[[0]])
    assert greedy.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 1.1}, {"repetition_penalty": 0.0}],
)
def test_sampling_refuses_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.7},
        {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_parity_filtered_distributions_are_transformers(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 500, generator=generator) * 3
    texts = torch.randint(500, (64, 30), generator=generator)
    makers: dict[str, Any] = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    theirs = LogitsProcessorList([make(settings[name]) for name, make in makers.items() if name in settings])
    expected = theirs(texts, logits.clone()).softmax(dim=-1)  # type: ignore[arg-type]
    got = next_token_distribution(logits, Sampling(**settings), texts=texts.tolist())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert distribution(temperature=temperature).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("penalty", [1e-45, 1e-60, 1e60])
def test_penalties_beyond_float32_leave_a_distribution(penalty: float) -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0]])
    for temperature in (1.0, 0.1, 1e-40):
        sampling = Sampling(repetition_penalty=penalty, temperature=temperature)
        got = next_token_distribution(logits, sampling, texts=[[0, 1, 2]])[0]
        assert got.sum().item() == pytest.approx(1)
        assert got.argmax().item() == (0 if penalty < 1 else 3)


def test_seeds_may_be_any_integers() -> None:
    logits = torch.zeros(2, 50)
    seeds = [-1, 0, 2**64 + 7, 2**64 - 1, 10**30 + 3]
    drawn = [Choice(Sampling(seed=seed), 2).draw(logits, [[], []]) for seed in seeds]
    assert drawn[0] == drawn[3]
    assert len({tuple(tokens) for tokens in drawn}) == 4


def test_draws_follow_the_distribution() -> None:
    sampling, draws = Sampling(temperature=1.5, top_k=3, seed=5), 20_000
    choice = Choice(sampling, 1)
    tokens = torch.tensor([choice.draw(LOGITS, [[]])[0] for _ in range(draws)])
    expected = next_token_distribution(LOGITS, sampling)[0] * draws
    counts = torch.bincount(tokens, minlength=4)
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:].square() / expected[1:]).sum()
    assert chi_square < 13.8  # exceeded once in a thousand seeds, 2 degrees of freedom


def test_draws_of_a_text_depend_on_its_seed_and_place_alone() -> None:
    flat = torch.zeros(1, 50)

    def draw(seed: int, batch: int) -> list[list[int]]:
        choice = Choice(Sampling(seed=seed), batch)
        return [choice.draw(flat.expand(batch, -1), [[]] * batch) for _ in range(20)]

    assert draw(1, 1) == draw(1, 1) != draw(2, 1)
    first, second = zip(*draw(1, 2))
    assert [[token] for token in first] == draw(1, 1)
    assert first != second
