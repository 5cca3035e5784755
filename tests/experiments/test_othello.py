"""The Othello experiment end to end at a tiny size, by the command line; and its interventions on what came out."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.experiment import main

pytest.importorskip("rust_reversi", reason="the extra `othello` is not installed")

from steerscale.experiments.othello import dataset, hooks_of, trained
from steerscale.experiments.othello_board import LABELS, legal_mask, read_probes
from steerscale.experiments.othello_edit import Case, Probes, errors, in_random_direction, make_cases, run_cases
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


def null_in_groups(lm: LanguageModel, cases: list[Case]) -> torch.Tensor:
    """Log probabilities of the model left alone, the cases in the same batches as with edits."""
    logs = torch.empty(len(cases), VOCABULARY)
    keys = [(case.square, case.mine, case.black) for case in cases]
    for key in set(keys):
        members = [number for number, other in enumerate(keys) if other == key]
        logs[members] = run_cases(lm, [cases[number] for number in members], {}, margin=0.0)
    return logs


def test_zero_strength_changes_nothing_bit_by_bit(
    lm: LanguageModel, cases: list[Case], probes: dict[str, Probes]
) -> None:
    still = run_cases(lm, cases, probes["mine"], margin=4.0, strength=0.0)
    moved = run_cases(lm, cases, probes["mine"], margin=4.0)
    left = null_in_groups(lm, cases)
    assert torch.equal(still, left)
    assert not torch.equal(still, moved)


def test_an_edit_reaches_its_margin_at_the_last_move_and_nowhere_else(
    lm: LanguageModel, cases: list[Case], probes: dict[str, Probes]
) -> None:
    hook, *_ = probes["mine"]
    case, seen = cases[0], {}

    def spy(edit, x_BSM: torch.Tensor) -> torch.Tensor:
        seen["before"] = x_BSM.clone()
        seen["after"] = edit(x_BSM.clone())
        return seen["after"]

    run_cases(lm, [case], {hook: probes["mine"][hook]}, margin=4.0, wrap=lambda edit: partial(spy, edit))
    probe = probes["mine"][hook][case.square]
    logits_C = dict(zip(probe.classes, probe.logits(seen["after"][0, case.at])))
    then, now = ("theirs", "mine") if case.mine else ("mine", "theirs")
    assert float(logits_C[then] - logits_C[now]) == pytest.approx(4.0, abs=1e-3)
    assert torch.equal(seen["after"][0, : case.at], seen["before"][0, : case.at])


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
