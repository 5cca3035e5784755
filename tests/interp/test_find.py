"""Latents are found by what they do: figures against plain definitions, gradients against finite differences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steerscale.cli import main
from steerscale.errors import ConfigError
from steerscale.interp import find
from steerscale.interp.find import Activity, label_figures, target_gradient
from steerscale.interp.interventions import logit_effect, patch
from steerscale.interp.recipes import load_recipe
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.interp.saes import HOOK, random_sae
from tests.models.gpts import GPT2, build_random

ONE = ParallelLayout()
D = GPT2.d_model
PROMPT = torch.randint(61, (9,), generator=torch.Generator().manual_seed(3)).tolist()


def sparse(values_VJ: torch.Tensor) -> Activity:
    place, latent = values_VJ.nonzero().T
    return Activity(
        latent_n=latent,
        place_n=place,
        value_n=values_VJ[place, latent],
        num_latents=values_VJ.shape[1],
        num_places=len(values_VJ),
    )


def test_auc_counts_pairs_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (40, 6), generator=generator).clamp_min(0).float() / 2
    values[:, 5] = 0
    has = torch.rand(40, generator=generator) < 0.3
    found = label_figures(sparse(values), has)
    for latent in range(6):
        inside, outside = values[has, latent], values[~has, latent]
        pairs = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
        assert float(found["auc"][latent]) == pytest.approx(float(pairs.mean()))
        assert float(found["inside"][latent]) == pytest.approx(float(inside.mean()))
        assert float(found["active outside"][latent]) == pytest.approx(float((outside > 0).double().mean()))
    assert float(found["auc"][5]) == 0.5
    with pytest.raises(ConfigError, match="0 places have the label and 40"):
        label_figures(sparse(values), torch.zeros(40, dtype=torch.bool))


def test_pooling_is_the_mean_of_each_text() -> None:
    values = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    values = values.clamp_min(0)
    text = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    pooled = sparse(values).pooled(text)
    dense = torch.zeros(3, 4)
    dense[pooled.place_n, pooled.latent_n] = pooled.value_n
    torch.testing.assert_close(dense, torch.stack([values[text == number].mean(dim=0) for number in range(3)]))


def test_pattern_labels_words_and_signs() -> None:
    (example, other) = find.pattern_examples(["In May 2024, he said.", "No date"], r"\d+|May")
    labels = {example.text[span.begin : span.end]: span.label for span in example.spans}
    assert labels == {
        "In": "other",
        "May": "match",
        "2024": "match",
        ",": "other",
        "he": "other",
        "said": "other",
        ".": "other",
    }
    assert {span.label for span in other.spans} == {"other"}
    with pytest.raises(ConfigError, match="no regular expression"):
        find.pattern_examples(["x"], "(")


def gradient(layout: ParallelLayout) -> tuple[torch.Tensor, torch.Tensor]:
    with initialize(layout) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        return target_gradient(lm, PROMPT, 7, HOOK)


def test_gradient_is_what_a_small_change_does(pool: RankPool) -> None:
    x_SM, gradient_SM = gradient(ONE)
    step = torch.randn(x_SM.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        after, before = (
            lm.logits(torch.tensor([PROMPT]), {HOOK: patch((x_SM + sign * step)[None])})[0, -1].log_softmax(-1)[7]  # type: ignore[index]
            for sign in (1, -1)
        )
    assert float(after - before) / 2 == pytest.approx(float((gradient_SM * step).sum()), rel=0.02)
    for part_x, part_gradient in pool.run(gradient, ParallelLayout(tensor=2), ranks=2):
        torch.testing.assert_close(part_x, x_SM, rtol=0, atol=2e-5)
        torch.testing.assert_close(part_gradient, gradient_SM, rtol=0, atol=2e-5)


def test_attribution_direct_effect_and_direction_add_up() -> None:
    sae = random_sae(D)
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        x_SM, gradient_SM = target_gradient(lm, PROMPT, 7, HOOK)
        found = find.find_by_attribution(lm, sae, [PROMPT], 7, hook=HOOK, count=96)
        direct = find.find_by_direct_effect(lm, sae, 7, count=96)
        effect_JV = logit_effect(lm, sae.W_dec / 1.7)
    assert effect_JV is not None
    parts = sae.encode(x_SM) @ sae.W_dec / 1.7
    total = float((parts * gradient_SM).sum())
    assert sum(one.figures["attribution"] for one in found) == pytest.approx(total, rel=1e-3)
    assert found[0].figures["attribution"] == max(one.figures["attribution"] for one in found)
    z_J = (effect_JV[:, 7] - effect_JV.mean(dim=1)) / effect_JV.std(dim=1, correction=0)
    assert [one.latent for one in direct[:5]] == z_J.topk(5).indices.tolist()
    assert direct[0].figures["z"] == pytest.approx(float(z_J.max()), rel=1e-3)
    best = find.find_by_direction(sae, sae.W_dec[17] * 3, count=1)[0]
    assert best.latent == 17
    assert best.figures["decoder"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="width 5"):
        find.find_by_direction(sae, torch.ones(5))


def test_find_and_sweep_commands(sae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae, recipe = str(sae_run), tmp_path / "found.yaml"
    texts = {"with": ["Das Paket ist da.", "Ein Paket mehr.", "Das Paket fehlt.", "Kein Paket hier."] * 5}
    texts["without"] = ["Wir gehen nach Hause.", "Heute ist es kalt.", "Niemand war dort.", "Sie kommt nie."] * 5
    files = {name: tmp_path / f"{name}.txt" for name in texts}
    for name, path in files.items():
        path.write_text("\n".join(texts[name]), encoding="utf-8")
    save_file({"way": torch.linspace(-1, 1, 32)}, tmp_path / "way.safetensors")
    contrast = ["--contrast", str(files["with"]), str(files["without"])]
    words = ["--pattern", "Paket", "--text", str(files["with"])]
    for way in (
        ["--query", r"\w", "--samples", "8"],
        words,
        ["--direction", f"{tmp_path / 'way.safetensors'}:way"],
        contrast,
    ):
        assert main(["sae", "find", sae, *way, "--count", "2", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) == 2
        assert all(0 <= row["latent"] < 128 and row["promoted"] for row in rows)
    assert main(["sae", "find", sae, *contrast, "--count", "1", "--save", str(recipe), "--times", "3"]) == 0
    latent = int(capsys.readouterr().out.splitlines()[1].split()[0])
    (edit,) = load_recipe(recipe).saes[0].edits
    assert edit.latent == latent == rows[0]["latent"]
    assert edit.target == pytest.approx(3 * rows[0]["largest"], rel=1e-3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Das Paket\nWir gehen\nEs ist kalt\n", encoding="utf-8")
    sweep = ["steer", "sweep", str(recipe), "--prompts", str(prompts), "--strengths", "1", "--max-tokens", "4"]
    sweep += ["--concept", "(?i)[a-z]+", "--instruction", "Vom Paket.", "--pair", "Paket", "Haus", *contrast]
    assert main([*sweep, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    points = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))["points"]
    methods = ["none", "found", "prompting", "activation addition", "difference of means", "probe"]
    assert [point["method"] for point in points] == methods
    assert all(method in out for method in methods)
    assert (tmp_path / "out" / "sweep.png").is_file()
    for wrong, message in (
        (["sae", "find", sae, "--pattern", "x"], "needs a text file"),
        (["sae", "find", sae, *words, "--latent", "128"], "latent 128 is not among"),
        (["sae", "find", sae, *words, "--latent", "-1"], "latent -1 is not among"),
        (["sae", "find", sae, "--query", "x", "--latent", "1"], "--latent goes with --pattern"),
        (["sae", "find", sae, *words, "--spare-first", "-1"], "must not be negative"),
        ([*sweep, "-o", str(prompts)], "cannot be made"),
        (["sae", "find", sae, "--task", "pos", "--data", "nowhere.txt"], "needs --label"),
        (["sae", "find", sae, "--target", "a"], "give --prompt"),
        (["sae", "find", sae, "--direct", "Das Paket ist da"], "must be one token"),
        ([*sweep[:7], "--concept", "("], "no regular expression"),
        (["steer", "sweep", str(tmp_path / "no.yaml"), *sweep[3:]], "cannot be read as YAML"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
