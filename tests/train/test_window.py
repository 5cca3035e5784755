"""Averages between reports, with a clock that is set by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from steerscale.engines.megatron import StepResult, Totals
from steerscale.parallel.layout import ParallelLayout
from steerscale.train.window import Window

LAYOUT = ParallelLayout(micro_batch_size=2, gradient_accumulation_steps=4)


class Hand:
    """A clock."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hand:
    """A clock at 100 seconds."""
    return Hand()


def step(window: Window, clock: Hand, seconds: float, *, loss: float = 2.0, tokens: int = 10, **more: Any) -> None:
    """A step that spends half of its time in "forward-backward"."""
    settings = SimpleNamespace(**{"applied": True, "layout": LAYOUT, "lr": 0.1, "grad_norm": 1.0, **more})
    window.begin(settings.layout)
    with window.time("forward-backward"):
        clock.now += seconds / 2
    clock.now += seconds / 2
    totals = Totals(loss_sum=loss * tokens, tokens=tokens)
    result = StepResult(totals=totals, grad_norm=settings.grad_norm, applied=settings.applied)
    window.end(result, lr=settings.lr, size=settings.layout.global_batch_size)


def averages(window: Window) -> dict[str, Any]:
    """There have been steps."""
    values = window.averages()
    assert values is not None
    return values


def test_window_without_steps_has_nothing_to_say() -> None:
    assert Window(skip=0).averages() is None


def test_times_are_means_over_steps_and_loss_over_tokens(clock: Hand) -> None:
    window = Window(skip=0, clock=clock)
    step(window, clock, 1.0, loss=2.0, tokens=10, lr=0.1)
    clock.now += 50.0  # between steps: nobody's
    step(window, clock, 3.0, loss=4.0, tokens=30, lr=0.2, grad_norm=7.0)
    assert averages(window) == {
        "loss": (2.0 * 10 + 4.0 * 30) / 40,
        "grad_norm": 7.0,
        "lr": 0.2,
        "global_batch_size": 8,
        "seconds_per_step": 2.0,
        "timed_steps": 2,
        "step_seconds": [1.0, 3.0],
        "seconds": {"forward-backward": 1.0},
        "seconds_between_steps": {},
    }


def test_warmup_steps_are_left_out_of_times_but_not_of_the_loss(clock: Hand) -> None:
    window = Window(skip=2, clock=clock)
    step(window, clock, 100.0, loss=1.0)
    assert averages(window)["seconds_per_step"] is None
    assert averages(window)["seconds"] == {}
    assert averages(window)["step_seconds"] == []
    step(window, clock, 100.0, loss=2.0)
    step(window, clock, 1.0, loss=3.0)
    step(window, clock, 2.0, loss=4.0)
    values = averages(window)
    assert (values["seconds_per_step"], values["timed_steps"]) == (1.5, 2)
    assert values["step_seconds"] == [1.0, 2.0]
    assert values["seconds"] == {"forward-backward": 0.75}
    assert values["loss"] == 2.5


def test_warmup_is_over_after_a_report(clock: Hand) -> None:
    window = Window(skip=1, clock=clock)
    step(window, clock, 100.0)
    window.reset()
    step(window, clock, 1.0)
    assert averages(window)["seconds_per_step"] == 1.0


def test_evaluation_and_checkpoints_are_not_in_the_steps(clock: Hand) -> None:
    window = Window(skip=1, clock=clock)
    for _ in range(3):
        step(window, clock, 1.0)
        with window.time("checkpoint", between_steps=True):
            clock.now += 10.0
    values = averages(window)
    assert values["seconds_per_step"] == 1.0
    assert values["seconds_between_steps"] == {"checkpoint": 30.0}
    window.reset()
    step(window, clock, 1.0)
    assert averages(window)["seconds_between_steps"] == {}


def test_skipped_steps_do_not_count_in_the_loss(clock: Hand) -> None:
    window = Window(skip=0, clock=clock)
    step(window, clock, 1.0, loss=math.nan, applied=False)
    assert math.isnan(averages(window)["loss"])
    step(window, clock, 1.0, loss=3.0)
    assert averages(window)["loss"] == 3.0
    assert averages(window)["timed_steps"] == 2


def test_window_knows_whether_all_steps_had_one_batch_size(clock: Hand) -> None:
    window, larger = Window(skip=0, clock=clock), LAYOUT.with_global_batch(16)
    step(window, clock, 1.0)
    step(window, clock, 1.0)
    assert window.uniform
    step(window, clock, 1.0, layout=larger)
    assert not window.uniform
    assert (window.layout, averages(window)["global_batch_size"]) == (larger, 16)
    window.reset()
    step(window, clock, 1.0, layout=larger)
    assert window.uniform
