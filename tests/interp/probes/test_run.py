"""Labels reach the right tokens, probes and their edits are the same on every layout, and the command does both."""

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerscale.cli import main
from steerscale.errors import ConfigError, DataError
from steerscale.generation import generate
from steerscale.interp.interventions import capture
from steerscale.interp.probes import run as probe_run
from steerscale.interp.probes.activations import Encoded, Place, collect, encode_examples
from steerscale.interp.probes.edit import probe_edit
from steerscale.interp.probes.fit import FitConfig
from steerscale.interp.probes.labels import Example, Span, read_examples, split_examples, universal_tag
from steerscale.interp.probes.probe import read_probe
from steerscale.interp.probes.run import ProbeConfig, expand_hooks, make_task, run_probes
from steerscale.interp.steering import effect, held_out_loss
from steerscale.language_model import LanguageModel
from steerscale.models.hook_points import KINDS
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sampling import GREEDY
from steerscale.testing.ranks import RankPool
from tests.interp.labelled import CharacterTokenizer, examples
from tests.models.gpts import GPT2, build_random
from tests.sae.training import language_model
from tests.train.runs import train

ATOL = 2e-5  # float32 logits of order 1 to 10
ONE = ParallelLayout()
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "PP2": ParallelLayout(pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
}
HOOKS = ["blocks.3.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
CONFIG = ProbeConfig(
    kinds=("diff_means", "logistic"), train=400, test=120, min_examples=5, fit=FitConfig(l2=1.0, tolerance=1e-6)
)
TOKENS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))


def model(context: object) -> LanguageModel:
    return LanguageModel(build_random(GPT2, context), context, tokenizer=CharacterTokenizer(), prefix=[0])  # type: ignore[arg-type]


def observe(layout: ParallelLayout) -> dict[str, np.ndarray]:
    """Figures and weights of probes on all ranks; what edits by them do, where logits are."""
    with initialize(layout) as context:
        lm = model(context)
        probes = run_probes(lm, make_task(lm, examples(160), CONFIG), HOOKS, CONFIG)
        assert [(probe.hook, probe.kind) for probe in probes] == [
            (hook, kind) for hook in (HOOKS[1], HOOKS[2], HOOKS[0]) for kind in CONFIG.kinds
        ]
        found = {
            probe.name: np.array([probe.about[key] for key in ("accuracy", "ece", "control_accuracy", "selectivity")])
            for probe in probes
        }
        by = {probe.name: probe for probe in probes}
        middle, last = by[f"{HOOKS[2]}.diff_means"], by[f"{HOOKS[0]}.diff_means"]
        found["weights"] = middle.weight_CM.numpy()
        edits = {
            "set": {middle.hook: probe_edit(middle, "set", target="verb", value=2.0)},
            "swap": {last.hook: probe_edit(last, "swap", target="verb", other="noun", positions=[-1])},
            "project": {middle.hook: probe_edit(middle, "project"), last.hook: probe_edit(last, "project")},
            "add": {last.hook: probe_edit(last, "add", target="det", value=1.0, strength=2.0)},
        }
        for name, functions in edits.items():
            logits = lm.logits(TOKENS, functions)
            told, loss = effect(lm, functions, TOKENS[0].tolist()), held_out_loss(lm, functions, [TOKENS])
            if logits is not None and told is not None and loss is not None:
                found[name] = logits.numpy()
                found[f"{name} numbers"] = np.array([told.kl, loss.before, loss.after])
        plain = lm.logits(TOKENS)
        lm.close()  # the last message between stages must not end with the model
        found |= {} if plain is None else {"plain": plain.numpy()}
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_probes_and_edits(layout: str, pool: RankPool) -> None:
    expected = observe(ONE)
    ranks = pool.run(observe, LAYOUTS[layout], ranks=LAYOUTS[layout].world_size)
    assert set().union(*ranks) == set(expected)
    for found in ranks:
        assert {name for name in expected if name.startswith("blocks")} <= set(found)
        for name, value in found.items():
            atol = 5e-3 if name.startswith("blocks") else ATOL  # a vector on a boundary may fall on either side
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=atol, err_msg=name)
    for name in ("set", "swap", "project", "add"):
        assert np.abs(expected[name] - expected["plain"]).max() > 0.01, name
    # Letters tell the kind of a word; which of them it was is told by heart as well.
    assert expected[f"{HOOKS[1]}.logistic"][0] > 0.95


def test_words_are_aligned_to_their_tokens() -> None:
    example = Example(text="cde xz o", spans=(Span(0, 3, "noun"), Span(4, 6, "verb"), Span(7, 8, "det")))
    with initialize(ONE) as context:
        lm = model(context)
        places = {
            position: [
                (place.begin, place.end, place.label)
                for place in encode_examples(lm, [example], position=position, vectors=99)[0].places
            ]
            for position in ("last", "first", "mean", "all")
        }
        # Tokens: the prefix, c d e, a space, x z, a space, o. A space belongs to the word after it.
        assert places["last"] == [(3, 4, "noun"), (6, 7, "verb"), (8, 9, "det")]
        assert places["first"] == [(1, 2, "noun"), (4, 5, "verb"), (7, 8, "det")]
        assert places["mean"] == [(1, 4, "noun"), (4, 7, "verb"), (7, 9, "det")]
        assert len(places["all"]) == 8
        (cut,) = encode_examples(lm, [example], position="last", vectors=2)
        assert (len(cut.tokens), len(cut.places)) == (7, 2)
        late = encode_examples(lm, [example], position="last", vectors=9, drop_first=4)[0]
        assert [place.label for place in late.places] == ["verb", "det"]
        whole = Example(text="cde xz", label="A")
        (text,) = encode_examples(lm, [whole], position="last", vectors=9)
        assert text.places == (Place(6, 7, "A", lm.tokenizer.piece(lm.tokenizer.encode("z")[0])),)
        long = Example(text="ab " * 9 + "cde", spans=(Span(3, 5, "noun"), Span(27, 30, "noun")))
        assert len(encode_examples(lm, [long], position="last", vectors=9)[0].places) == 1  # the second is cut off
        changed = Example(text="ÄÖ ab", spans=(Span(3, 5, "noun"),))
        with pytest.raises(DataError, match="decode to other words"):
            encode_examples(lm, [changed] * 30, position="last", vectors=9)


def test_activations_are_those_of_each_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerscale.interp.probes.activations.BATCH_TOKENS", 40)
    with initialize(ONE) as context:
        lm = model(context)
        encoded = [
            Encoded(tokens=(0, 3, 4, 5, 6, 7), places=(Place(1, 2, "a", "x"), Place(2, 5, "b", "y"))),
            Encoded(tokens=(0, 9, 8), places=(Place(2, 3, "a", "z"),)),
            Encoded(tokens=(0, 9, 8, 7, 11, 3, 2, 1, 5), places=(Place(8, 9, "a", "z"),)),
        ] * 3
        said: list[tuple[int, int]] = []
        found = collect(lm, encoded, HOOKS, on_progress=lambda done, total: said.append((done, total)))
        expected = []
        for one in encoded:
            x_SM = capture(lm, torch.tensor([one.tokens]), [HOOKS[0]])[HOOKS[0]][0]
            expected += [x_SM[place.begin : place.end].mean(dim=0) for place in one.places]
    torch.testing.assert_close(found[HOOKS[0]], torch.stack(expected), rtol=0, atol=ATOL)
    assert len(said) > 1
    assert said[-1] == (54, 54)


def test_little_memory_takes_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def spy(lm: LanguageModel, encoded: list[Encoded], hooks: list[str], **kwargs: object) -> dict[str, torch.Tensor]:
        calls.append(hooks)
        return collect(lm, encoded, hooks)

    monkeypatch.setattr(probe_run, "collect", spy)
    with initialize(ONE) as context:
        lm = model(context)
        config = ProbeConfig(train=100, test=40, min_examples=5, kinds=("ridge",), control=False, memory_gib=1e-5)
        done: list[probe_run.Progress] = []
        probes = run_probes(lm, make_task(lm, examples(80), config), HOOKS, config, on_progress=done.append)
        forward = [f"blocks.0.{kind}" for kind in KINDS]
        task = make_task(lm, examples(80), config)
        ordered = run_probes(lm, task, forward[::-1], replace(config, memory_gib=4.0))
    assert [probe.hook for probe in ordered] == forward
    assert len(calls) == 4
    assert len(probes) == 3
    assert "control_accuracy" not in probes[0].about
    assert (done[-1].what, done[-1].done, done[-1].total) == ("probes", 3, 3)


def test_a_probe_edit_works_while_text_is_generated() -> None:
    with initialize(ONE) as context:
        lm = model(context)
        task = make_task(lm, examples(120), CONFIG)
        (probe,) = run_probes(lm, task, [HOOKS[0]], ProbeConfig(kinds=("diff_means",), train=400, test=100))
        functions = {probe.hook: probe_edit(probe, "set", target="noun", value=6.0)}
        cached, anew = (
            generate(lm, [[0, 5, 9]], GREEDY, max_tokens=8, functions=functions, cache=cache) for cache in (True, False)
        )
        edited, plain = (lm.logits(TOKENS, chosen) for chosen in (functions, {}))
    assert cached[0].tokens == anew[0].tokens
    assert edited is not None
    assert plain is not None
    assert float((edited - plain).abs().max()) > 0.01


def test_hook_patterns_and_tasks_without_classes() -> None:
    with initialize(ONE) as context:
        lm = model(context)
        assert expand_hooks(["all"], lm)[:2] == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
        assert expand_hooks(["every:2", "blocks.1.hook_resid_post"], lm) == [
            "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
        ]  # fmt: skip
        with pytest.raises(ConfigError, match="positive N"):
            expand_hooks(["every:x"], lm)
        alike = [Example(text="ab cd", label="A", group=group) for group in range(50)]
        with pytest.raises(DataError, match=r"two or more classes.*'A': 40"):
            make_task(lm, alike, CONFIG)


def test_files_of_labels(tmp_path: Path) -> None:
    tagged = tmp_path / "tagged.txt.xz"
    tagged.write_bytes(
        lzma.compress(b"The/at jury/nn said/vbd ``/`` no/at ''/'' ,/, over/rp-hl ./.\n\nDidn't/dod* go/vb\n")
    )
    first, second = read_examples("pos", path=tagged)
    assert first.text == 'The jury said "no", over.'
    assert [(first.text[span.begin : span.end], span.label) for span in first.spans[-3:]] == [
        (",", "."), ("over", "PRT"), (".", ".")
    ]  # fmt: skip
    assert [span.label for span in second.spans] == ["VERB", "VERB"]
    assert [span.label for span in read_examples("pos", path=tagged, tagset="as-written")[1].spans] == ["dod*", "vb"]
    assert [universal_tag(tag) for tag in ("NN$-TL", "*", "FW-IN", "PPSS+BEM", "--", "XYZ")] == [
        "NOUN", "PRT", "X", "PRON", ".", "X"
    ]  # fmt: skip
    parallel = tmp_path / "two.tsv"
    parallel.write_text("src\tyes\tja\nsrc\tno\t\n", encoding="utf-8")
    found = read_examples("language", path=parallel, classes=("en", "de"))
    assert [(one.text, one.label, one.group) for one in found] == [("yes", "en", 1), ("ja", "de", 1), ("no", "en", 2)]
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "good", "label": 1}\n{"words": ["a", "b"], "labels": ["x", "y"]}\n', encoding="utf-8")
    assert [one.label for one in read_examples(str(own))] == ["1", None]
    table = tmp_path / "own.tsv"
    table.write_text("label\ttext\nA\tone\n", encoding="utf-8")
    assert read_examples(str(table))[0].label == "A"


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.txt", "The/at word\n", r"line 1: 'word' is no word/TAG"),
        ("a.txt", "", "holds no example"),
        ("a.tsv", "one\ttwo\nA\tB\n", "must begin with a header"),
        ("a.tsv", "label\ttext\nA\n", "line 2: 1 columns"),
        ("a.jsonl", '{"text": "x"}\n', "line 1 must be"),
        ("a.jsonl", "{\n", "line 1 is no JSON"),
        ("a.jsonl", '{"words": ["x"], "labels": []}\n', "1 words and 0 labels"),
        ("a.jsonl", b"\xff\xfe\n", "not UTF-8"),
        ("a.txt.xz", b"nonsense", "cannot be read as xz"),
    ],
)
def test_bad_files_of_labels_are_refused(name: str, content: str | bytes, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tagged = ".txt" in name
    with pytest.raises(DataError, match=wrong):
        read_examples("pos" if tagged else str(path), path=path if tagged else None)


def test_tasks_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for task, options, wrong in (
        ("pos", {}, "needs a file"),
        ("sentiment", {}, r"pos, language, or a \.tsv"),
        (str(tmp_path / "x.tsv"), {"path": tmp_path}, "belongs to the tasks"),
        ("language", {"path": tmp_path / "x.tsv", "classes": ["en"]}, "two or more classes"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            read_examples(task, **options)
    with pytest.raises(DataError, match="no input file"):
        read_examples(str(tmp_path / "none.tsv"))


def test_the_split_keeps_groups_together() -> None:
    both = [Example(text=str(number), label="A", group=number // 2) for number in range(40)]
    train, test = split_examples(both, seed=1, held_out=0.25)
    assert (len(train), len(test)) == (30, 10)
    assert not {one.group for one in train} & {one.group for one in test}
    assert split_examples(both, seed=2, held_out=0.25)[1] != test
    with pytest.raises(DataError, match="one example alone"):
        split_examples(both[:2], seed=1, held_out=0.25)


def write_words(path: Path) -> Path:
    lines = [
        json.dumps({"words": one.text.split(), "labels": [span.label for span in one.spans]}) for one in examples(120)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_probe_command_fits_and_applies(
    pool: RankPool, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = language_model(german_data, tmp_path / "lm")
    pool.run(train, lm, ranks=1)
    run, out = str(tmp_path / "lm"), str(tmp_path / "probes")
    task, hook = str(write_words(tmp_path / "words.jsonl")), "blocks.1.hook_resid_post"
    fit = ["probe", run, "--task", task, "--kinds", "logistic", "mlp", "--train", "300", "--test", "80"]
    assert main([*fit, "--hooks", "every:2", "--min-examples", "5", "-o", out]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("3 classes (det, noun, verb), 300 vectors, 80 held out")
    assert "probes: 6 of 6, ETA 0s" in told.err
    assert sum(line.startswith("blocks.") for line in told.out.splitlines()) == 6
    assert (tmp_path / "probes" / "probes.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "probes" / "results.json").read_text())
    probe = read_probe(tmp_path / "probes", hook=hook, kind="logistic")
    assert [row["accuracy"] for row in results["probes"] if row["hook"] == hook and row["kind"] == "logistic"] == [
        probe.about["accuracy"]
    ]
    apply = ["probe", run, "--apply", out, "--hook", hook, "--kind", "logistic", "--prompt", "Das Paket"]
    valid = ["--text", str(german_data), "--samples", "4", "--max-tokens", "4"]
    picture = str(tmp_path / "pictures" / "effect.png")
    what = ["--set", "verb=9", "--strength", "0", "1", "--watch", "die", "-o", picture]
    assert main([*apply, *what, *valid]) == 0
    told = capsys.readouterr()
    assert "strength 0: the next token, KL 0 nats" in told.out
    assert "edited:  Das Paket" in told.out
    losses = [line for line in told.out.splitlines() if ": loss on " in line]
    assert "(+0.0000 nats" in losses[0]
    assert "(+0.0000 nats" not in losses[1]
    assert Path(picture).is_file()
    assert main([*apply, "--swap", "noun", "verb", "--positions=-1"]) == 0
    assert "edited:" not in capsys.readouterr().out
    for wrong, arguments in (
        ("holds probes already", [*fit, "-o", out]),
        ("is no directory", [*fit, "-o", task]),
        ("cannot be a picture", [*apply, "--swap", "noun", "verb", "-o", "effect.txt"]),
        ("outside of the text's", [*apply, "--project", "--positions", "99"]),
        ("no hook point 'blocks.99", [*fit, "--hooks", "blocks.99.hook_resid_post"]),
        ("kind must be one of", [*fit, "--kinds", "forest"]),
        ("needs an edit", apply),
        ("like CLASS=1.5", [*apply, "--set", "verb=x"]),
        ("no class 'adv'", [*apply, "--add", "adv"]),
        ("--positions must be like", [*apply, "--project", "--positions", "x"]),
        ("no directions", [*apply[:6], "--kind", "mlp", "--project"]),
        ("leave out --against", [*apply, "--swap", "noun", "verb", "--against", "det"]),
    ):
        assert main(arguments) == 2, wrong
        assert wrong in capsys.readouterr().err
