import math

import pytest

from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.planning.flops import model_flops_per_token
from steerscale.planning.scaling_ladder import check_tokens, held_out_rung, ladder, make_rung

LIKE = ModelConfig(
    num_layers=4,
    d_model=128,
    num_heads=4,
    d_ff=384,
    seq_len=128,
    vocab_size=2048,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)
LARGE = ModelConfig(num_layers=12, d_model=768, num_heads=12, seq_len=2048, vocab_size=50304)


def test_rules_are_those_of_the_papers() -> None:
    rung = make_rung(LARGE, 2e9)
    n = LARGE.num_parameters(embeddings=False)
    assert rung.lr == pytest.approx(1.79 * n**-0.713 * 2e9**0.307, rel=1e-3)
    assert rung.batch * 2048 == pytest.approx(0.58 * 2e9**0.571, rel=0.02)
    assert rung.tokens == pytest.approx(2e9, rel=1e-3)
    assert rung.warmup_steps * rung.batch * 2048 == pytest.approx(LARGE.num_parameters(), rel=0.01)
    assert rung.flops == model_flops_per_token(LARGE) * rung.tokens
    assert rung.overrides()["optim.min_lr"] == pytest.approx(rung.lr / 10)
    # Far below the models of the rule its learning rate ends, and a warm-up of N tokens would be most of the run.
    small = make_rung(LIKE, 2e6)
    assert small.lr == pytest.approx(2**-7, rel=1e-3)
    assert make_rung(LIKE, 2e6, largest_lr=2e-3).lr == 2e-3
    assert small.warmup_steps == pytest.approx(small.steps / 10, abs=1)


def test_every_size_on_every_number_of_tokens_cheapest_first() -> None:
    rungs = ladder([1e6, 2.4e5, 5e5], [1e6, 5e5, 2e6], like=LIKE, multiple=8)
    assert len({rung.name for rung in rungs}) == 9
    assert [rung.flops for rung in rungs] == sorted(rung.flops for rung in rungs)
    for rung in rungs:
        assert rung.batch % 8 == 0
        assert min(abs(math.log(rung.parameters / size)) for size in (2.4e5, 5e5, 1e6)) < 0.1
        assert rung.model.vocab_size == 2048
        assert (rung.model.activation, rung.model.seq_len) == ("swiglu", 128)


def test_what_is_held_out_lies_beyond_the_ladder() -> None:
    rungs = ladder([2.4e5, 5e5, 1e6], [5e5, 1e6, 2e6], like=LIKE)
    rung = held_out_rung(rungs, 2e6, 4e6, like=LIKE)
    assert rung.held_out
    assert rung.name.endswith("_held_out")
    with pytest.raises(ConfigError, match="the ladder goes up to"):
        held_out_rung(rungs, 1e6, 1e6, like=LIKE)


def test_repeated_text_is_named_and_at_last_refused() -> None:
    rungs = ladder([2.4e5, 5e5, 1e6], [5e5, 1e6, 2e6], like=LIKE)
    assert check_tokens(rungs, 3_000_000) == []
    (warning,) = check_tokens(rungs, 1_000_000)
    assert "reads the dataset 2.0 times" in warning
    with pytest.raises(ConfigError, match=r"5\.0 times"):
        check_tokens(rungs, 400_000)
