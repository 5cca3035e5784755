"""Learning rates by hand."""

import pytest

from steerscale.errors import ConfigError
from steerscale.optim import OptimConfig, learning_rate

TENTH = {"lr": 1.0, "min_lr": 0.1}


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    config = OptimConfig(**TENTH, schedule="constant", warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_by_hand() -> None:
    config = OptimConfig(**TENTH, schedule="cosine", warmup_steps=2)
    # 8 steps of decay: step 2 at the top, 4 a quarter (cos 45 degrees), 6 in the middle, 10 at the end and beyond.
    expected = {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.1 + 0.45 * (1 + 2**-0.5), 6: 0.55, 8: 0.1 + 0.45 * (1 - 2**-0.5)}
    for step, lr in (expected | {10: 0.1, 50: 0.1}).items():
        assert learning_rate(config, step, 10) == pytest.approx(lr, rel=1e-12), step


def test_cosine_ends_after_decay_steps() -> None:
    config = OptimConfig(**TENTH, schedule="cosine", warmup_steps=2, decay_steps=6)
    expected = {2: 1.0, 4: 0.55, 6: 0.1, 9: 0.1}
    assert {step: learning_rate(config, step, 100) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_at_the_end() -> None:
    config = OptimConfig(**TENTH, schedule="wsd", warmup_steps=2, decay_steps=3)
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1]
    assert [learning_rate(config, step, 10) for step in range(11)] == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_over_a_tenth_by_default() -> None:
    config = OptimConfig(**TENTH, schedule="wsd")
    assert [learning_rate(config, step, 20) for step in (17, 18, 19)] == pytest.approx([1.0, 0.55, 0.1], rel=1e-12)
    assert [learning_rate(config, step, 5) for step in (3, 4)] == pytest.approx([1.0, 0.1], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lr": 0.0}, "lr"),
        ({"min_lr": -1.0}, "min_lr"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_steps": 0}, "decay_steps"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": -1.0}, "clip"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_optim_config_refuses(settings: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optim\.{key} must .*got {next(iter(settings.values()))}"):
        OptimConfig(**settings)
