"""Steering by latents: a delta that nothing cancels, equal on every layout; strength 0 is no steering."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerscale.cli import main
from steerscale.errors import ConfigError
from steerscale.generation import generate
from steerscale.interp.combine import chained, weighted
from steerscale.interp.features import describe_latents
from steerscale.interp.interventions import add_direction, capture, patch
from steerscale.interp.steering import Edit, Effect, Steering, When, effect, held_out_loss
from steerscale.interp.steering_plot import plot_effect
from steerscale.language_model import LanguageModel
from steerscale.models.config import ModelConfig
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from steerscale.sae.weights import SAEWeights
from steerscale.sampling import GREEDY
from steerscale.testing.ranks import RankPool
from tests.interp.saes import HOOK, perfect_sae, random_sae, silent_sae
from tests.models.gpts import GPT2, build_random

ATOL = 2e-5  # float32 logits of order 1 to 10
ONE = ParallelLayout()
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "PP2": ParallelLayout(pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
    "TP3xPP2": ParallelLayout(tensor=3, pipeline=2),
}
THIRDS = replace(GPT2, num_heads=6, pad_vocab_to=24)  # what three ranks can share
TOKENS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(2))
D = GPT2.d_model
EDITS = [Edit(latent=3, value=4.0), Edit(latent=70, value=0.0, mode="scale"), Edit(latent=41, value=1.5, mode="add")]


def model(context: object, config: ModelConfig = GPT2) -> LanguageModel:
    return LanguageModel(build_random(config, context), context)  # type: ignore[arg-type]


def logits_of(lm: LanguageModel, functions: Mapping[str, HookFunction] | None = None) -> torch.Tensor:
    """[B, S, V] of TOKENS, in one process."""
    logits_BSV = lm.logits(TOKENS, functions)
    assert logits_BSV is not None
    return logits_BSV


def edited(features: torch.Tensor) -> torch.Tensor:
    """What EDITS make of all features, written out."""
    features = features.clone()
    features[..., 3] = 4.0
    features[..., 70] = 0.0
    features[..., 41] += 1.5
    return features


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_delta_is_splicing_changed_latents_plus_the_error_term(architecture: str) -> None:
    sae = random_sae(D, architecture)

    def splice(x_BSM: torch.Tensor) -> torch.Tensor:
        features = sae.encode(x_BSM)
        error_BSM = x_BSM - sae.decode(features)
        assert error_BSM.norm() > 0.5 * x_BSM.norm()
        return sae.decode(edited(features)) + error_BSM

    with initialize(ONE) as context:
        lm = model(context)
        spliced, plain = logits_of(lm, {HOOK: splice}), logits_of(lm)
        steered = logits_of(lm, Steering(sae, EDITS).functions(lm))
        half = Steering(sae, EDITS, strength=0.5)
        x_BSM = capture(lm, TOKENS, [HOOK])[HOOK]
    torch.testing.assert_close(steered, spliced, rtol=0, atol=ATOL)
    assert float((steered - plain).abs().max()) > 0.1
    torch.testing.assert_close(half.delta(x_BSM) * 2, Steering(sae, EDITS).delta(x_BSM))


@pytest.mark.parametrize("make", [perfect_sae, silent_sae])
def test_steering_works_whatever_the_sae_reconstructs(make: object) -> None:
    sae: SAEWeights = make(D)  # type: ignore[operator]
    with initialize(ONE) as context:
        lm = model(context)
        x_BSM = capture(lm, TOKENS, [HOOK])[HOOK]
        functions = Steering(sae, [Edit(latent=5, value=9.0)]).functions(lm)
        steered_BSM = capture(lm, TOKENS, [HOOK], functions)[HOOK]
    assert torch.equal(steered_BSM[..., :5], x_BSM[..., :5])
    own = x_BSM[..., 5].relu() if make is perfect_sae else torch.zeros_like(x_BSM[..., 5])
    torch.testing.assert_close(steered_BSM[..., 5] - x_BSM[..., 5], 9.0 - own)


def test_no_change_is_no_change_bit_by_bit() -> None:
    sae = random_sae(D)
    with initialize(ONE) as context:
        lm = model(context)
        plain = logits_of(lm)
        assert torch.equal(logits_of(lm, Steering(sae, EDITS, strength=0.0).functions(lm)), plain)
        same = [Edit(latent=3, value=1.0, mode="scale"), Edit(latent=9, value=0.0, mode="add")]
        assert torch.equal(logits_of(lm, Steering(sae, same).functions(lm)), plain)
        (function,) = Steering(sae, same).functions(lm).values()
        zeros = torch.full((1, 2, D), -0.0)
        assert torch.signbit(function(zeros.clone())).all()  # type: ignore[arg-type]
        silent = [Edit(latent=3, value=9.0, where="active")]
        assert torch.equal(logits_of(lm, Steering(silent_sae(D), silent).functions(lm)), plain)
        nowhere = [Edit(latent=3, value=4.0, when=When(latent=9, above=1e9)), Edit(latent=70, value=2.0, strength=0.0)]
        assert torch.equal(logits_of(lm, Steering(sae, nowhere).functions(lm)), plain)
        assert torch.equal(logits_of(lm, {HOOK: weighted(lm, add_direction(torch.ones(D)), 0.0)}), plain)


def test_special_tokens_and_first_positions_are_spared_unless_asked_for() -> None:
    edits = [Edit(latent=3, value=4.0)]
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context, special_ids=frozenset({int(TOKENS[1, 4])}))
        x_BSM = capture(lm, TOKENS, [HOOK])[HOOK]
        moved = []
        for spare in (True, False):
            functions = Steering(random_sae(D), edits, spare_special=spare).functions(lm)
            moved.append((capture(lm, TOKENS, [HOOK], functions)[HOOK] != x_BSM).any(dim=-1))
        first = Steering(random_sae(D), edits, spare_first=3).functions(lm)
        moved.append((capture(lm, TOKENS, [HOOK], first)[HOOK] != x_BSM).any(dim=-1))
        # New tokens come alone, but they are no first ones.
        cached, anew = (
            generate(lm, [[5], [1, 2, 3, 4]], GREEDY, max_tokens=8, functions=first, cache=cache)
            for cache in (True, False)
        )
    ordinary = TOKENS.ne(TOKENS[1, 4])
    assert torch.equal(moved[0], ordinary)
    assert moved[1].all()
    assert torch.equal(moved[2], ordinary & (torch.arange(9) >= 3))
    assert [result.tokens for result in cached] == [result.tokens for result in anew]


def steer(layout: ParallelLayout, config: ModelConfig) -> dict[str, np.ndarray | list[int]]:
    """What steering does, as far as this rank knows: texts everywhere, the rest where the logits are."""
    with initialize(layout) as context:
        lm = model(context, config)
        found: dict[str, np.ndarray | list[int]] = {}
        for architecture in ("relu", "topk"):
            functions = Steering(random_sae(D, architecture), EDITS).functions(lm)
            way = weighted(lm, add_direction(torch.linspace(-1, 1, D)), 0.5, spare_first=2)
            functions[HOOK] = chained([functions[HOOK], way])
            logits, told = lm.logits(TOKENS, functions), effect(lm, functions, TOKENS[0].tolist())
            loss = held_out_loss(lm, functions, [TOKENS[:2], TOKENS[2:]])
            (text,) = generate(lm, [TOKENS[0].tolist()], GREEDY, max_tokens=4, functions=functions)
            found[f"{architecture} text"] = text.tokens
            if logits is not None and told is not None and loss is not None:
                found[architecture] = logits.numpy()
                found[f"{architecture} numbers"] = np.array([told.kl, loss.before, loss.after, loss.tokens])
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_steering(layout: str, pool: RankPool) -> None:
    config = THIRDS if LAYOUTS[layout].tensor == 3 else GPT2
    expected = steer(ONE, config)
    ranks = pool.run(steer, LAYOUTS[layout], config, ranks=LAYOUTS[layout].world_size)
    assert sum("relu" in found for found in ranks) == LAYOUTS[layout].tensor
    for found in ranks:
        assert set(found) in (set(expected), {"relu text", "topk text"})
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=ATOL, err_msg=name)


def test_the_sum_of_deltas_is_direct_patching() -> None:
    sae = random_sae(D)
    whole = Steering(sae, EDITS)
    with initialize(ONE) as context:
        lm = model(context)
        x_BSM = capture(lm, TOKENS, [HOOK])[HOOK]
        parts = [Steering(sae, [edit]).delta(x_BSM) for edit in EDITS]
        plain, patched = logits_of(lm), logits_of(lm, {HOOK: patch(x_BSM + sum(parts))})
        steered = logits_of(lm, whole.functions(lm))
        one_by_one = logits_of(lm, {HOOK: chained([add_direction(part[0, 0]) for part in parts])})
        added = logits_of(lm, {HOOK: add_direction(sum(part[0, 0] for part in parts))})  # type: ignore[arg-type]
    torch.testing.assert_close(whole.delta(x_BSM), sum(parts), rtol=0, atol=ATOL)
    torch.testing.assert_close(steered, patched, rtol=0, atol=ATOL)
    torch.testing.assert_close(one_by_one, added, rtol=0, atol=ATOL)
    assert float((steered - plain).abs().max()) > 0.1


def test_effect_and_loss_are_what_they_say(tmp_path: Path) -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.75, 0.0])
    one = Effect(before_V=p, after_V=q)
    assert one.kl == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(3))
    assert [token for token, *_ in one.rows(2)] == [1, 0]
    plot_effect(tmp_path / "effect.png", one, ["a", "$b", "c"], one.rows(3), title="x$")
    assert (tmp_path / "effect.png").stat().st_size > 5000
    with initialize(ONE) as context:
        lm = model(context)
        nothing = held_out_loss(lm, {}, [TOKENS])
        losses_BS = torch.nn.functional.cross_entropy(logits_of(lm)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert nothing is not None
    assert nothing.before == nothing.after == pytest.approx(float(losses_BS), abs=1e-6)
    assert nothing.tokens == 24


def test_features_are_found_where_they_are_largest() -> None:
    sae, tokens = random_sae(D), torch.randint(61, (6, 11), generator=torch.Generator().manual_seed(8))
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context, special_ids=frozenset({int(tokens[0, 0])}))
        features = describe_latents(lm, sae, [3, 90], [tokens[:4], tokens[4:]], num_contexts=3, width=2, num_tokens=4)
        inputs = tokens[:, :-1]
        values = sae.encode(capture(lm, inputs, [HOOK])[HOOK]) * (inputs != tokens[0, 0]).unsqueeze(-1)
        lens = lm.unembed(lm.final_norm.weight * (sae.W_dec[90] - sae.W_dec[90].mean()) / 1.7)
    for feature in features:
        best = values[..., feature.latent].max(dim=1)
        assert [context.value for context in feature.contexts] == pytest.approx(best.values.topk(3).values.tolist())
        row = int(best.values.argmax())
        top = feature.contexts[0]
        assert top.tokens[top.at] == int(inputs[row, best.indices[row]])
        active = values[..., feature.latent] > 0
        assert feature.frequency == pytest.approx(float(active.sum() / (inputs != tokens[0, 0]).sum()))
        assert feature.mean == pytest.approx(float(values[..., feature.latent][active].mean()), rel=1e-5)
    assert [token for token, _ in features[1].promoted] == lens.topk(4).indices.tolist()
    assert [token for token, _ in features[1].suppressed] == (-lens).topk(4).indices.tolist()


def test_steering_refuses_what_it_cannot_do() -> None:
    sae = random_sae(D)
    for edits, wrong in (
        ([], "at least one latent"),
        ([Edit(latent=96, value=1.0)], "latent 96"),
        ([EDITS[0]] * 2, "differ"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            Steering(sae, edits)
    for make in (
        lambda: Edit(latent=1, value=float("nan")),
        lambda: Edit(latent=1, value=1.0, strength=float("inf")),
        lambda: Steering(sae, EDITS, strength=float("nan")),
    ):
        with pytest.raises(ConfigError, match="finite"):
            make()
    with pytest.raises(ConfigError, match="one hook point"):
        Steering(replace(sae, subtract_b_dec=False, hook_out="blocks.1.hook_mlp_out"), EDITS)
    with pytest.raises(ConfigError, match="does not say"):
        Steering(replace(sae, hook=None), EDITS)
    with initialize(ONE) as context:
        lm = model(context)
        with pytest.raises(ConfigError, match="width 8"):
            Steering(random_sae(8), EDITS).functions(lm)
        with pytest.raises(ConfigError, match=r"no hook point 'blocks\.9"):
            logits_of(lm, Steering(sae, EDITS, hook="blocks.9.hook_resid_post").functions(lm))


def test_steer_command_on_a_run_and_on_an_exported_sae(
    sae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "effect.png"
    what = ["--latent", "5", "--target", "20", "--prompt", "Das Paket", "--max-tokens", "5", "--samples", "4"]
    assert main(["steer", str(sae_run), *what, "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("'Das Paket': the next token, KL ")
    assert float(lines[0].split()[-2]) > 0.01
    assert lines[1].split() == ["token", "before", "after", "change"]
    assert "without: Das Paket" in out
    assert "steered: Das Paket" in out
    assert lines[-1].startswith("loss on ")
    assert picture.is_file()
    exported = tmp_path / "saelens"
    assert main(["sae", "convert", str(sae_run), str(exported)]) == 0
    capsys.readouterr()
    lm, data = sae_run.parent / "german_demo", lines[-1].split(" of ")[1].split(":")[0]
    assert main(["steer", str(exported), *what, "--model", str(lm), "--text", data]) == 0
    assert capsys.readouterr().out == out
    saved = tmp_path / "recipe.yaml"
    assert main(["steer", str(sae_run), *what, "--strength", "0"]) == 0
    assert "KL 0 nats" in capsys.readouterr().out
    assert main(["steer", str(sae_run), *what, "--save", str(saved)]) == 0
    recipe = ["steer", str(saved), *what[4:]]
    assert main(recipe) == 0
    assert capsys.readouterr().out == 2 * out
    assert main([*recipe, "--strength", "0.5", "--save", str(saved)]) == 0
    half = capsys.readouterr().out
    assert main(recipe) == 0
    assert capsys.readouterr().out == half != out
    assert main([*recipe, "--latent", "5"]) == 2
    assert "--latent says what" in capsys.readouterr().err


def test_steer_command_says_what_is_missing(sae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sae(random_sae(32), tmp_path / "sae")
    for arguments, message in (
        ([str(tmp_path / "sae"), "--latent", "1", "--target", "2"], "--model"),
        ([str(sae_run), "--latent", "1", "--latent", "2", "--add", "2"], "a value for each"),
        ([str(sae_run), "--latent", "128", "--scale", "0"], "latent 128"),
        ([str(sae_run), "--latent", "5"], "nothing to steer"),
        ([str(sae_run), "--latent", "5", "--add", "1", "-o", str(tmp_path / "effect.txt")], "cannot be a picture"),
        (
            [str(sae_run), "--latent", "5", "--add", "1", "--save", str(tmp_path / "sae" / "cfg.json" / "x")],
            "cannot be written",
        ),
        ([str(sae_run), "--latent", "5", "--add", "1", "--strength", "nan"], "finite"),
    ):
        assert main(["steer", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_features_command_shows_contexts(sae_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "features", str(sae_run), "--latent", "5", "77", "--samples", "8", "--contexts", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("promoted:") == 2
    assert out.startswith("latent 5: active on")
    assert "[[" in out
