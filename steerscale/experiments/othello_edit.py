"""Change the board that the GPT believes in: flip a disc along the probes' direction, and see which moves it then holds legal.

For n legal moves on the board with the flipped disc, the error is the number of false positives and false negatives among the
n moves that the GPT finds most likely (Li et al. 2022, section 4.2). The null intervention leaves the GPT alone.

Shapes: B cases, S sequence, M d_model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from steerscale.experiments.othello_config import InterventionConfig
from steerscale.experiments.othello_games import VOCABULARY, legal_tokens, replay, set_up
from steerscale.experiments.stages import Bench, Results
from steerscale.interp.probes.edit import probe_edit
from steerscale.interp.probes.probe import Probe
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction

Probes = Mapping[str, Sequence[Probe]]
"""64 of them by hook point."""
Wrap = Callable[[HookFunction], HookFunction]
BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """A position, a disc to flip, and what is legal then."""

    tokens: np.ndarray
    """The game's, int64 [S]."""
    at: int
    """Position of the last move in them."""
    square: int
    """Whose disc is flipped."""
    black: bool
    """Whether it was a black one."""
    mine: bool
    """Whether it was a disc of the player to move."""
    before: tuple[int, ...]
    """Legal tokens on the board as it is."""
    after: tuple[int, ...]
    """Legal tokens on the board with the flipped disc."""


def make_cases(games: np.ndarray, *, first_move: int, last_move: int, seed: int) -> list[Case]:
    """A case a game: a move drawn evenly, then a disc among those that change what is legal and leave some move so."""
    boards, legal = replay(games)
    draw, cases = np.random.default_rng(seed), []
    for g, tokens in enumerate(games):
        t = int(draw.integers(first_move, last_move + 1))
        mover = int(boards.mover_GT[g, t])
        if mover == 0:
            continue
        black_64, white_64 = boards.black_GT64[g, t], boards.white_GT64[g, t]
        for square in draw.permutation(np.flatnonzero(black_64 | white_64)).tolist():
            after = legal_after_flip(black_64, white_64, mover, square)
            if after and sorted(after) != sorted(legal[g][t]):
                black = bool(black_64[square])
                cases.append(
                    Case(
                        tokens=tokens,
                        at=t + 1,
                        square=square,
                        black=black,
                        mine=black == (mover > 0),
                        before=tuple(legal[g][t]),
                        after=tuple(after),
                    )
                )
                break
    return cases


def legal_after_flip(black_64: np.ndarray, white_64: np.ndarray, mover: int, square: int) -> list[int]:
    """Legal tokens on the board (bool [64] each) with the disc on `square` turned; `mover` as in `Boards`."""
    flipped_64 = np.arange(64) == square
    return legal_tokens(set_up(_bits(black_64 ^ flipped_64), _bits(white_64 ^ flipped_64), mover))


def _bits(discs_64: np.ndarray) -> int:
    return int.from_bytes(np.packbits(discs_64).tobytes(), "big")


def run_cases(
    lm: LanguageModel,
    cases: Sequence[Case],
    probes: Probes,
    *,
    margin: float,
    strength: float = 1.0,
    wrap: Wrap | None = None,
) -> torch.Tensor:
    """Log probabilities [B, tokens] after every case's last move, with its disc flipped at the hook points of `probes`.

    Args:
        probes: none: the null intervention.
        margin: what the logit of the other owner is set to be above that of the present one.
        strength: factor of the change; 0 changes nothing, bit by bit.
        wrap: makes another function of each edit, for controls.
    """
    logs_BV = torch.empty(len(cases), VOCABULARY)
    by_length = sorted(range(len(cases)), key=lambda number: cases[number].at)
    for begin in range(0, len(cases), BATCH):
        members = by_length[begin : begin + BATCH]
        some = [cases[number] for number in members]
        at_B = torch.tensor([case.at for case in some])
        tokens_BS = torch.from_numpy(np.stack([case.tokens[: int(at_B.max()) + 1] for case in some]))
        functions = {
            hook: flip(some, of_hook, at_B, margin=margin, strength=strength, wrap=wrap)
            for hook, of_hook in probes.items()
        }
        logits = lm.logits(tokens_BS, functions, at_B=at_B)
        assert logits is not None
        logs_BV[members] = logits.log_softmax(dim=-1)
    return logs_BV


def flip(
    cases: Sequence[Case],
    probes: Sequence[Probe],
    at_B: torch.Tensor,
    *,
    margin: float,
    strength: float = 1.0,
    wrap: Wrap | None = None,
) -> HookFunction:
    """Turn each case's disc at its last move: its own probe's edit, in one function for the whole batch."""
    edits: list[tuple[list[int], HookFunction]] = []
    for square in sorted({case.square for case in cases}):
        probe = probes[square]
        seen = "mine" in probe.classes
        pair = ("mine", "theirs") if seen else ("black", "white")
        for first in (True, False):
            rows = [
                row
                for row, case in enumerate(cases)
                if case.square == square and (case.mine if seen else case.black) == first
            ]
            now, then = pair if first else pair[::-1]
            edit = probe_edit(probe, "set", target=then, other=now, value=margin, strength=strength)
            edits.append((rows, edit if wrap is None else wrap(edit)))

    def change(x_BSM: torch.Tensor) -> torch.Tensor:
        batch_B = torch.arange(len(x_BSM))
        last_BM = x_BSM[batch_B, at_B]
        for rows, edit in edits:
            edited = edit(last_BM[rows].unsqueeze(1)) if rows else None
            if edited is not None:
                last_BM[rows] = edited.squeeze(1)
        x_BSM[batch_B, at_B] = last_BM
        return x_BSM

    return change


def in_random_direction(generator: torch.Generator, edit: HookFunction) -> HookFunction:
    """A change just as long as the edit's, in a direction that says nothing."""

    def change(x_BSM: torch.Tensor) -> torch.Tensor | None:
        edited = edit(x_BSM.clone())
        if edited is None:
            return None
        length = (edited - x_BSM).norm(dim=-1, keepdim=True)
        noise = torch.randn(x_BSM.shape, generator=generator).to(x_BSM)
        return x_BSM + length * noise / noise.norm(dim=-1, keepdim=True)

    return change


def errors(logs_BV: torch.Tensor, cases: Sequence[Case], *, edited: bool = True) -> np.ndarray:
    """False positives and false negatives of each case, float64 [B]; against the board as it is unless `edited`."""
    counted = []
    for logs_V, case in zip(logs_BV, cases):
        legal = case.after if edited else case.before
        best = (logs_V[1:].topk(len(legal)).indices + 1).tolist()
        counted.append(2.0 * len(set(legal) - set(best)))
    return np.array(counted)


def summary(logs_BV: torch.Tensor, cases: Sequence[Case]) -> Results:
    """Errors against the edited and the true board, and the probability of moves that only one of them allows."""
    probabilities_BV = logs_BV.exp().numpy()
    changed = errors(logs_BV, cases)
    gained = [row[list(set(c.after) - set(c.before))].sum() for row, c in zip(probabilities_BV, cases)]
    lost = [row[list(set(c.before) - set(c.after))].sum() for row, c in zip(probabilities_BV, cases)]
    return {
        "error": float(changed.mean()),
        "sem": float(changed.std(ddof=1) / np.sqrt(len(changed))),
        "perfect": float((changed == 0).mean()),
        "error_on_true_board": float(errors(logs_BV, cases, edited=False).mean()),
        "probability_newly_legal": float(np.mean(gained)),
        "probability_no_longer_legal": float(np.mean(lost)),
    }


def measure_interventions(
    lm: LanguageModel,
    cases: Sequence[Case],
    probes: Mapping[str, Probes],
    config: InterventionConfig,
    *,
    seed: int,
    bench: Bench,
) -> Results:
    """First layer and margin are chosen on one half of the cases; the errors reported are those of the other half.

    The edit is made at the end of every layer from the first one on, each time by that layer's own probe: later layers would
    otherwise compute the true board again from the moves.

    Args:
        probes: by kind of label, "mine" and "colour"; their hook points in the order of the layers.
    """
    choosing, reporting = cases[::2], cases[1::2]
    hooks = list(probes["mine"])
    grid = [(first, margin) for first in range(len(hooks)) for margin in config.margins]

    def edited(some: Sequence[Case], kind: str, first: int, margin: float, wrap: Wrap | None = None) -> torch.Tensor:
        chosen = {hook: probes[kind][hook] for hook in hooks[first:]}
        return run_cases(lm, some, chosen, margin=margin, wrap=wrap)

    def tried(kind: str, first: int, margin: float) -> float:
        return float(errors(edited(choosing, kind, first, margin), choosing).mean())

    scan = {
        (kind, *point): bench.part(f"{kind}.{point[0]}.{point[1]:g}", partial(tried, kind, *point))
        for kind, *point in bench.track([(kind, *point) for kind in probes for point in grid])
    }
    best = {kind: min(grid, key=lambda point, kind=kind: scan[kind, *point]) for kind in probes}
    generator = torch.Generator().manual_seed(seed)
    first, margin = best["mine"]
    logs = {
        "null": run_cases(lm, reporting, {}, margin=0.0),
        "mine": edited(reporting, "mine", first, margin),
        "colour": edited(reporting, "colour", *best["colour"]),
        "random": edited(reporting, "mine", first, margin, partial(in_random_direction, generator)),
        "one_layer": run_cases(lm, reporting, {hooks[first]: probes["mine"][hooks[first]]}, margin=margin),
    }
    by_first = {
        hook: min((scan["mine", number, margin], margin) for margin in config.margins)[1]
        for number, hook in enumerate(hooks)
    }
    return {
        "cases": {"choosing": len(choosing), "reporting": len(reporting)},
        "chosen": {kind: {"first": hooks[point[0]], "margin": point[1]} for kind, point in best.items()},
        "scan": [[kind, hooks[first], margin, value] for (kind, first, margin), value in scan.items()],
        "reported": {name: summary(found, reporting) for name, found in logs.items()},
        "by_first_layer": {
            hook: summary(edited(reporting, "mine", number, by_first[hook]), reporting)
            for number, hook in enumerate(hooks)
        },
        "legal_after": float(np.mean([len(case.after) for case in reporting])),
        "changed_moves": float(np.mean([len(set(case.after) ^ set(case.before)) for case in reporting])),
    }
