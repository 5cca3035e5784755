"""SAEs whose latents are known: what they hold, absorb and what is spurious is found; the command and its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerscale.cli import main
from steerscale.errors import ConfigError, DataError
from steerscale.interp.probes.labels import Example
from steerscale.interp.probes.run import ProbeConfig, ProbeTask, Side
from steerscale.interp.sae_bench.absorption import absorption, first_letter_words
from steerscale.interp.sae_bench.export import write_saebench
from steerscale.interp.sae_bench.matching import match_decoders
from steerscale.interp.sae_bench.run import BenchConfig, BenchResult, run_bench
from steerscale.interp.sae_bench.scr import spurious_removal
from steerscale.interp.sae_bench.sparse_probing import sparse_probing
from steerscale.interp.sources import SAESource
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from steerscale.sae.weights import SAEWeights
from steerscale.testing.ranks import RankPool
from tests.interp.labelled import CharacterTokenizer, examples
from tests.interp.saes import HOOK, perfect_sae, random_sae
from tests.models.gpts import GPT2, build_random
from tests.sae.training import language_model
from tests.train.runs import train

WIDTH = 12
CONFIG = BenchConfig(probe=ProbeConfig(train=300, test=120, min_examples=5), ks=(1, 2), removed=(2, 5), scr_texts=400)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def source(sae: SAEWeights, *, spare_first: int = 0) -> SAESource:
    return SAESource(
        sae=sae, hook=HOOK, lm=None, checkpoint=None, text=None, spare_special=True, spare_first=spare_first
    )


def test_sparse_probing_finds_the_one_latent_that_holds_a_class() -> None:
    """Class b is coordinate 3; class c is coordinates 5 and 7 together, which no latent holds alone."""
    x_VM = noise(1500, WIDTH, seed=0) * 0.3
    y_V = torch.randint(3, (1500,), generator=torch.Generator().manual_seed(1))
    x_VM[y_V == 1, 3] += 1.4
    x_VM[y_V == 2, 5] += 0.8
    x_VM[y_V == 2, 7] += 0.8
    control_V = torch.zeros_like(y_V)
    task = ProbeTask(("a", "b", "c"), Side([], y_V[:1000], control_V), Side([], y_V[1000:], control_V), 0.3)
    found = {record.name: record for record in sparse_probing(perfect_sae(WIDTH), x_VM, task, ks=(1, 2))}
    assert found["b"].latents[0] == 3
    assert found["b"].sae[1] > 0.96
    assert found["b"].coordinates[1] > 0.96
    assert set(found["c"].latents) == {5, 7}
    assert 0.6 < found["c"].sae[1] < found["c"].sae[2] < found["c"].dense + 0.02
    with pytest.raises(ConfigError, match="k must be from 1"):
        sparse_probing(perfect_sae(WIDTH), x_VM, task, ks=(99,))


def letters_and_activations() -> tuple[list[str], torch.Tensor]:
    """Letter a is coordinate 0. A quarter of the words are coordinate 5 as well, whatever their letter."""
    letters = [letter for _ in range(60) for letter in "aabbcc"]
    x_VM = noise(len(letters), WIDTH, seed=2).abs() * 0.01
    for row, letter in enumerate(letters):
        x_VM[row, "abc".index(letter)] += 1
        if row // 6 % 4 == 0:
            x_VM[row, 5] += 1
    return letters, x_VM


def absorbing_sae() -> SAEWeights:
    """Latent 0 is silent where coordinate 5 is active, and the decoder row of latent 5 brings the letter along."""
    sae = perfect_sae(WIDTH)
    W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
    W_enc[5, 0] = -2
    W_dec[5, 0] = 1
    return replace(sae, W_enc=W_enc, W_dec=W_dec)


def test_absorption_is_found_where_it_is_and_only_there() -> None:
    letters, x_VM = letters_and_activations()
    for sae, rate in ((absorbing_sae(), 0.25), (perfect_sae(WIDTH), 0.0)):
        found = {record.letter: record for record in absorption(sae, x_VM, letters)}
        assert found["a"].main[0] == 0
        assert found["a"].probe_f1 == 1.0
        assert found["a"].words == 60
        assert found["a"].rate == pytest.approx(rate, abs=0.01)
        assert found["a"].fraction == pytest.approx(rate, abs=0.01)
        assert found["b"].rate == 0
        assert found["a"].absorbing == ((5,) if rate else ())
    with pytest.raises(DataError, match="of two letters"):
        absorption(perfect_sae(WIDTH), x_VM[:30], letters[:30])


@pytest.mark.parametrize("entangled", [False, True])
def test_removal_works_if_the_attribute_has_latents_of_its_own(entangled: bool) -> None:
    """Label: coordinate 2, weakly. Attribute: coordinates 4 and 6, strongly; entangled, every latent is both a little."""
    label_V = torch.arange(400) % 2
    spurious_V = torch.arange(400) // 2 % 2
    texts_T = torch.arange(400).repeat_interleave(3)
    x_TM = noise(1200, WIDTH, seed=3) * 0.2
    x_TM[:, 2] += label_V[texts_T]
    x_TM[:, [4, 6]] += 3.0 * spurious_V[texts_T].unsqueeze(1)
    sae = perfect_sae(WIDTH)
    if entangled:
        rotation = torch.linalg.qr(noise(WIDTH, WIDTH, seed=4)).Q
        sae = replace(sae, W_enc=rotation @ sae.W_enc, W_dec=sae.W_dec @ rotation.T)
    found = spurious_removal(sae, x_TM, texts_T, label_V, spurious_V, name="label", numbers=(2, 3))
    assert found.before < 0.6
    assert found.oracle > 0.95
    assert found.spurious > 0.9
    if entangled:
        assert max(found.score.values()) < 0.3
    else:
        assert set(found.latents[:2]) == {4, 6}
        assert found.score[2] > 0.8
    with pytest.raises(DataError, match="of each combination"):
        spurious_removal(sae, x_TM, texts_T, label_V, label_V, name="label")


def test_decoders_are_matched_whatever_their_order_and_length() -> None:
    first = random_sae(WIDTH, latents=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    kept = order[:30]
    second = replace(
        first,
        W_enc=first.W_enc[:, kept],
        W_dec=first.W_dec[kept] * 3,
        b_enc=None if first.b_enc is None else first.b_enc[kept],
    )
    found = match_decoders(first, second, pairs=5)
    assert found.mutual == 30
    assert found.mean_second == pytest.approx(1, abs=1e-5)
    assert 0.75 <= found.found_first < 1
    assert found.found_second == 1
    assert len(found.pairs) == 5
    assert all(int(kept[b]) == a and cosine > 0.999 for a, b, cosine in found.pairs)
    with pytest.raises(ConfigError, match="widths 12 and 24"):
        match_decoders(first, random_sae(24))


def scr_examples() -> list[Example]:
    """`a` or `b` words, in the company of `x` or `y`."""
    return [
        Example(text=f"{label}{label} {spurious}{spurious}", label=label, spurious=spurious, group=index)
        for index in range(60)
        for label in "ab"
        for spurious in "xy"
    ]


def bench(layout: ParallelLayout) -> dict[str, dict[str, object]]:
    """The figures, on every rank."""
    with initialize(layout) as context:
        tokenizer = CharacterTokenizer()
        lm = LanguageModel(build_random(GPT2, context), context, tokenizer=tokenizer, prefix=[0])
        saes = {"one": source(random_sae(GPT2.d_model)), "two": source(random_sae(GPT2.d_model, "topk"), spare_first=2)}
        found = run_bench(lm, saes, CONFIG, examples=examples(160), scr=scr_examples())
        return {name: one.values() for name, one in found.items()}


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(pipeline=2)], ids=["TP2", "PP2"])
def test_parity_bench(layout: ParallelLayout, pool: RankPool) -> None:
    expected = bench(ParallelLayout())
    for found in pool.run(bench, layout, ranks=2):
        for name in ("one", "two"):
            for ours, theirs in zip(found[name]["probing"], expected[name]["probing"], strict=True):  # type: ignore[call-overload]
                assert ours["dense"] == pytest.approx(theirs["dense"], abs=0.02)
                assert ours["sae"] == pytest.approx(theirs["sae"], abs=0.02)
            for ours, theirs in zip(found[name]["removal"], expected[name]["removal"], strict=True):  # type: ignore[call-overload]
                assert ours["oracle"] == pytest.approx(theirs["oracle"], abs=0.02)
                assert ours["latents"][0] == theirs["latents"][0]


def test_bench_refuses_what_it_cannot_measure() -> None:
    with initialize(ParallelLayout()) as context:
        lm = LanguageModel(build_random(GPT2, context), context, tokenizer=CharacterTokenizer(), prefix=[0])
        with pytest.raises(ConfigError, match="of width 24"):
            run_bench(lm, {"x": source(random_sae(8))}, CONFIG)
        sae = {"x": source(random_sae(GPT2.d_model))}
        with pytest.raises(DataError, match="two labels and two spurious values"):
            run_bench(lm, sae, CONFIG, scr=[replace(one, spurious="x") for one in scr_examples()])
        with pytest.raises(DataError, match="words in the vocabulary"):
            first_letter_words(lm, words=10, seed=0)
    with pytest.raises(ConfigError, match="ks must be"):
        BenchConfig(ks=(0,))


SPARSE = {
    "eval_type_id",
    "eval_config",
    "eval_id",
    "datetime_epoch_millis",
    "eval_result_metrics",
    "eval_result_details",
}
ABOUT = {"sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict"}


def test_export_has_saebench_s_layout(tmp_path: Path) -> None:
    letters, x_VM = letters_and_activations()
    with initialize(ParallelLayout()) as context:
        lm = LanguageModel(build_random(GPT2, context), context, tokenizer=CharacterTokenizer(), prefix=[0])
        sae = source(random_sae(GPT2.d_model))
        result = run_bench(lm, {"x": sae}, CONFIG, examples=examples(160), scr=scr_examples())["x"]
    result.absorption = absorption(absorbing_sae(), x_VM, letters)
    files = write_saebench(tmp_path, "a/b", result, sae, CONFIG, model="m", dataset="d")
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [
        f"{kind}/a_b_eval_results.json" for kind in ("sparse_probing", "absorption_first_letter", "scr")
    ]
    content = [json.loads(path.read_text()) for path in files]
    for one in content:
        assert set(one) == SPARSE | ABOUT | {"eval_result_unstructured"}
    assert set(content[0]["eval_result_metrics"]) == {"llm", "sae"}
    assert content[0]["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] == pytest.approx(
        sum(record.sae[1] for record in result.probing) / len(result.probing)
    )
    assert content[1]["eval_result_details"][0]["num_full_absorption"] == 15
    assert set(content[2]["eval_result_metrics"]["scr_metrics"]) == {
        f"scr_{which}_threshold_{n}" for which in ("dir1", "metric", "dir2") for n in (2, 5)
    }
    assert write_saebench(tmp_path / "none", "x", BenchResult(), sae, CONFIG, model="m", dataset="d") == []


def test_bench_command(pool: RankPool, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = language_model(german_data, tmp_path / "lm")
    pool.run(train, lm, ranks=1)
    for name, architecture in (("one", "relu"), ("two", "jumprelu")):
        write_sae(random_sae(32, architecture), tmp_path / name)
    task = tmp_path / "words.jsonl"
    task.write_text(
        "\n".join(
            json.dumps({"words": one.text.split(), "labels": [span.label for span in one.spans]})
            for one in examples(120)
        ),
        encoding="utf-8",
    )
    saes = [str(tmp_path / "one"), str(tmp_path / "two")]
    what = ["--model", str(tmp_path / "lm"), "--task", str(task), "--train", "300", "--test", "100", "--k", "1", "3"]
    assert main(["sae", "bench", *saes, *what, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:5] == ["sparse", "probing", "dense", "k=1", "k=3"]
    assert "mutual pairs" in out
    values = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(values["saes"]) == {"one", "two"}
    assert len(values["matching"]) == 1
    assert (tmp_path / "out" / "saebench" / "sparse_probing" / "two_eval_results.json").is_file()
    for wrong, arguments in (
        ("nothing to measure", [saes[0], "--model", str(tmp_path / "lm")]),
        ("name its directory with --model", [*saes, "--task", str(task)]),
        ("SAEs of one run", [*saes, "--sae", "x", *what]),
        ("are called one", [saes[0], saes[0], *what]),
    ):
        assert main(["sae", "bench", *arguments]) == 2
        assert wrong in capsys.readouterr().err
