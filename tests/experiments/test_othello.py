"""The Othello experiment end to end at a tiny size, by the command line; and its interventions on what came out."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.experiment import main

pytest.importorskip("rust_reversi", reason="the extra `othello` is not installed")

from steerscale.experiments.othello import dataset, hooks_of, trained
from steerscale.experiments.othello_board import LABELS, legal_mask, read_probes
from steerscale.experiments.othello_edit import Case, Probes, errors, flip, in_random_direction, make_cases, run_cases
from steerscale.experiments.othello_games import PAD, VOCABULARY, read_games
from steerscale.language_model import LanguageModel
from steerscale.metrics import read_records
from steerscale.rundir import read_status

TINY = [
    "name=tiny", "games.train=600", "games.valid=16", "games.test=120", "legality_games=20", "probes.train_games=60",
    "probes.test_games=20", "probes.per_game=8", "probes.fit.iterations=10", "interventions.games=30",
    "interventions.margins=[1,4]", "gpt.model.num_layers=2", "gpt.model.d_model=32", "gpt.model.num_heads=2",
    "gpt.train.steps=16", "gpt.train.eval_interval=0", "gpt.train.eval_samples=8", "gpt.optim.warmup_steps=2",
    "gpt.metrics.interval=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished experiment."""
    place = tmp_path_factory.mktemp("othello")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["othello/small", *TINY]) == 0
    return place / "runs" / "tiny"


@pytest.fixture
def lm(root: Path) -> Iterator[LanguageModel]:
    with trained(root / "train" / "gpt") as found:
        yield found


@pytest.fixture
def cases(root: Path) -> list[Case]:
    return make_cases(read_games(dataset(root), "test")[80:], first_move=4, last_move=50, seed=0)


@pytest.fixture
def probes(root: Path, lm: LanguageModel) -> dict[str, Probes]:
    return {kind: read_probes(root / "probes", kind, hooks_of(lm)[1:]) for kind in LABELS}


def test_training_goes_through_the_loop_and_learns(root: Path) -> None:
    run = root / "train" / "gpt"
    assert read_status(run).state == "finished"
    losses = [record["loss"] for record in read_records(run, "train")]
    assert losses[-1] < losses[0]


def test_results_hold_every_measure(root: Path) -> None:
    found = json.loads((root / "results.json").read_text())["results"]
    assert (root / "othello.png").stat().st_size > 10_000
    assert 0 < found["legality"]["loss_of_the_rules"] < found["legality"]["loss"]
    assert 0.3 < found["legality"]["illegal_first_choice"] <= 1  # after 16 steps it knows next to nothing
    assert len(found["probes"]["trained"]["mine"]) == 3
    for kind in LABELS:  # even of few examples, the empty squares are the ones without a move
        assert found["probes"]["trained"][kind]["blocks.1.hook_resid_post"]["accuracy"] > 0.4
    reported = found["interventions"]["reported"]
    assert reported["null"]["error"] > 0
    assert set(reported) == {"null", "mine", "colour", "random", "one_layer"}


def test_second_start_runs_nothing_and_other_settings_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root.parent.parent)
    assert main(["othello/small", *TINY]) == 0
    assert capsys.readouterr().out.count("done before") == 5
    assert main(["othello/small", *TINY, "gpt.optim.lr=1e-3"]) == 2
    assert "stage 'train'" in capsys.readouterr().err


def test_zero_strength_changes_nothing_bit_by_bit(
    lm: LanguageModel, cases: list[Case], probes: dict[str, Probes]
) -> None:
    still = run_cases(lm, cases, probes["mine"], margin=4.0, strength=0.0)
    assert torch.equal(still, run_cases(lm, cases, {}, margin=0.0))
    assert not torch.equal(still, run_cases(lm, cases, probes["mine"], margin=4.0))


def test_flip_reaches_its_margin_at_each_last_move_and_nowhere_else(
    lm: LanguageModel, cases: list[Case], probes: dict[str, Probes]
) -> None:
    at_B = torch.tensor([case.at for case in cases])
    x_BSM = torch.randn(len(cases), 61, 32, generator=torch.Generator().manual_seed(0))
    for kind, pair in (("mine", ("mine", "theirs")), ("colour", ("black", "white"))):
        hook, *_ = probes[kind]
        changed_BSM = flip(cases, probes[kind][hook], at_B, margin=4.0)(x_BSM.clone())
        assert changed_BSM is not None
        for row, case in enumerate(cases):
            probe = probes[kind][hook][case.square]
            logits = dict(zip(probe.classes, probe.logits(changed_BSM[row, case.at]).tolist()))
            now, then = pair if (case.mine if kind == "mine" else case.black) else pair[::-1]
            assert logits[then] - logits[now] == pytest.approx(4.0, abs=1e-3)
            others = torch.arange(61) != case.at
            assert torch.equal(changed_BSM[row, others], x_BSM[row, others])


def test_random_direction_is_as_long_as_the_edit() -> None:
    x_BSM = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    change = in_random_direction(torch.Generator().manual_seed(1), lambda x: x + torch.arange(8.0))
    delta = change(x_BSM.clone()) - x_BSM
    assert torch.allclose(delta.norm(dim=-1), torch.arange(8.0).norm().expand(2, 3), atol=1e-4)
    assert float(delta[0, 0] @ torch.arange(8.0)) != pytest.approx(float(torch.arange(8.0).square().sum()))


def test_errors_count_false_positives_and_false_negatives() -> None:
    case = Case(tokens=np.zeros(1), at=0, square=0, black=True, mine=True, before=(1, 2, 3), after=(2, 3, 4))
    logs = torch.full((2, VOCABULARY), -9.0)
    logs[0, [2, 3, 4]] = 0.0  # what the edited board allows
    logs[1, [1, 2, 3]] = 0.0  # what the true one does: one false positive, one false negative
    logs[:, PAD] = 5.0  # no move at all
    assert errors(logs, [case, case]).tolist() == [0.0, 2.0]
    assert errors(logs, [case, case], edited=False).tolist() == [2.0, 0.0]


def test_legal_mask_marks_the_end_of_a_game() -> None:
    mask = legal_mask([[[3, 5], []]])
    assert mask[0, 0].nonzero().flatten().tolist() == [3, 5]
    assert mask[0, 1].nonzero().flatten().tolist() == [PAD]
