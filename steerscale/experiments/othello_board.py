"""Does the GPT play by the rules, and can the board be read from its residual stream?

Shapes: G games, T = 60 moves, V vectors, M d_model, 64 squares. The activation after move t stands at position t + 1.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from steerscale.experiments.othello_config import ProbeConfig
from steerscale.experiments.othello_games import MOVES, NAMES, PAD, VOCABULARY, Boards, replay
from steerscale.experiments.stages import Bench, Results
from steerscale.interp.interventions import capture
from steerscale.interp.probes.fit import FitConfig, fit_probe
from steerscale.interp.probes.probe import Probe, read_probe, write_probe
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.models.gpt import build_chunks, transformer_config
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout

LABELS = {"mine": ("empty", "mine", "theirs"), "colour": ("empty", "black", "white")}
"""What a probe is asked of a square: whose disc lies there as the player to move sees it, or of which colour it is."""
KIND = "logistic"
BATCH = 64


@contextlib.contextmanager
def trained(run_dir: Path) -> Iterator[LanguageModel]:
    """The GPT of a run on this process alone."""
    with initialize(ParallelLayout()) as context:
        yield load_language_model(run_dir, context)


def untrained(lm: LanguageModel, *, seed: int) -> LanguageModel:
    """The same GPT with new random weights."""
    chunks = build_chunks(lm.model, transformer_config(lm.model, lm.context), lm.context)
    initialize_parameters(chunks, lm.context, seed=seed)
    return LanguageModel(chunks, lm.context)


def hooks_of(lm: LanguageModel) -> list[str]:
    """The embedding, and what each block leaves in the residual stream."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(lm.model.num_layers))]


def measure_legality(lm: LanguageModel, games: np.ndarray, bench: Bench) -> Results:
    """How often the GPT's first choice is illegal, and what probability it gives to illegal moves; also by move number."""
    boards, legal = replay(games)
    wrong_GT = np.zeros((len(games), MOVES))
    illegal_GT, loss_GT = np.zeros_like(wrong_GT), np.zeros_like(wrong_GT)
    for begin in bench.track(range(0, len(games), BATCH)):
        part = slice(begin, begin + BATCH)
        tokens = torch.from_numpy(games[part])
        logits = lm.logits(tokens)
        assert logits is not None
        logs_GTV = logits[:, 1:].log_softmax(dim=-1)
        allowed_GTV = legal_mask(legal[part])
        choice_GT = logs_GTV[..., 1:].argmax(dim=-1, keepdim=True) + 1
        wrong_GT[part] = ~allowed_GTV.gather(-1, choice_GT).squeeze(-1).numpy()
        illegal_GT[part] = (logs_GTV.exp() * ~allowed_GTV).sum(dim=-1).numpy()
        next_GT1 = torch.cat([tokens[:, 2:], torch.zeros_like(tokens[:, :1])], dim=1).unsqueeze(-1)
        loss_GT[part] = -logs_GTV.gather(-1, next_GT1).squeeze(-1).numpy()
    on_GT = boards.mover_GT != 0
    floor_GT = np.log([[max(len(moves), 1) for moves in game] for game in legal])
    return {
        "games": len(games),
        "illegal_first_choice": float(wrong_GT[on_GT].mean()),
        "illegal_first_choice_sem": _sem_over_games(wrong_GT, on_GT),
        "illegal_probability": float(illegal_GT[on_GT].mean()),
        "loss": float(loss_GT[on_GT].mean()),
        "loss_of_the_rules": float(floor_GT[on_GT].mean()),
        "chance": float(1 - np.mean([len(moves) / MOVES for game in legal for moves in game if moves])),
        "illegal_by_move": [
            float(wrong_GT[:, t][on_GT[:, t]].mean()) if on_GT[:, t].any() else None for t in range(MOVES)
        ],
    }


def legal_mask(legal: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """bool [G, T, tokens]: what is legal; after the end of a game, PAD."""
    mask = torch.zeros(len(legal), MOVES, VOCABULARY, dtype=torch.bool)
    for g, game in enumerate(legal):
        for t, moves in enumerate(game):
            mask[g, t, moves or [PAD]] = True
    return mask


def _sem_over_games(values_GT: np.ndarray, on_GT: np.ndarray) -> float:
    """Standard error of the mean over positions, games being independent and their positions not."""
    means = (values_GT * on_GT).sum(1) / np.maximum(on_GT.sum(1), 1)
    return float(means.std(ddof=1) / np.sqrt(len(means)))


class Examples(NamedTuple):
    """Activations and the boards they belong to."""

    x: dict[str, torch.Tensor]
    """[V, M] by hook point."""
    y: dict[str, torch.Tensor]
    """int64 [V, 64] by kind of label; indices into LABELS."""


def board_labels(boards: Boards) -> dict[str, np.ndarray]:
    """int64 [G, T, 64] by kind of label; indices into LABELS."""
    colour = np.where(boards.black_GT64, 1, np.where(boards.white_GT64, 2, 0))
    # Seen by White, black discs are theirs.
    mine = np.where((boards.mover_GT[..., None] < 0) & (colour > 0), 3 - colour, colour)
    return {"mine": mine, "colour": colour}


def collect(lm: LanguageModel, games: np.ndarray, *, per_game: int, seed: int) -> Examples:
    """Activations after `per_game` moves drawn from each game, the same ones for every model."""
    boards, _ = replay(games)
    draw, labels = np.random.default_rng(seed), board_labels(boards)
    chosen_Gn = np.stack([_draw_moves(boards.mover_GT[g], per_game, draw) for g in range(len(games))])
    hooks = hooks_of(lm)
    parts: dict[str, list[torch.Tensor]] = {hook: [] for hook in hooks}
    for begin in range(0, len(games), BATCH):
        found = capture(lm, torch.from_numpy(games[begin : begin + BATCH]), hooks)
        at_Bn = torch.from_numpy(chosen_Gn[begin : begin + BATCH]) + 1
        for hook, x_BSM in found.items():
            parts[hook].append(x_BSM[torch.arange(len(x_BSM)).unsqueeze(1), at_Bn].flatten(0, 1))
    rows = np.arange(len(games))[:, None]
    return Examples(
        x={hook: torch.cat(x) for hook, x in parts.items()},
        y={kind: torch.from_numpy(y[rows, chosen_Gn].reshape(-1, 64).astype(np.int64)) for kind, y in labels.items()},
    )


def _draw_moves(mover_T: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    on = np.flatnonzero(mover_T)
    return draw.choice(on, size=count, replace=count > len(on))


def fit_squares(examples: Examples, kind: str, hook: str, config: FitConfig) -> list[Probe]:
    """A probe for each square; classes that never occur there (the centre is never empty) are left out."""
    probes = []
    for square in range(64):
        y_V = examples.y[kind][:, square]
        present = y_V.unique().tolist()
        classes = tuple(LABELS[kind][index] for index in present)
        y_V = torch.tensor([present.index(index) if index in present else -1 for index in range(3)])[y_V]
        about = {"square": NAMES[square], "label": kind}
        probes.append(
            fit_probe(examples.x[hook], y_V, classes, hook=hook, kind=KIND, position="all", config=config, about=about)
        )
    return probes


def score_squares(probes: Sequence[Probe], examples: Examples, kind: str) -> Results:
    """Accuracy over all squares, and over those where a disc lies; standard errors over squares."""
    names = LABELS[kind]
    answers_V64 = torch.stack(
        [
            torch.tensor([names.index(name) for name in probe.classes])[
                probe.logits(examples.x[probe.hook]).argmax(dim=1)
            ]
            for probe in probes
        ],
        dim=1,
    )
    truth_V64 = examples.y[kind]
    right_V64, disc_V64 = (answers_V64 == truth_V64).double(), truth_V64 > 0
    by_square = (right_V64 * disc_V64).sum(0) / disc_V64.sum(0).clamp_min(1)
    return {
        "accuracy": float(right_V64.mean()),
        "accuracy_on_discs": float(right_V64[disc_V64].mean()),
        "sem_on_discs": float(by_square.std() / 8),
    }


def majority(train: Examples, test: Examples, kind: str) -> Results:
    """What the most frequent class of each square is worth, and on discs its most frequent owner."""
    counts_3x64 = torch.stack([(train.y[kind] == index).sum(0) for index in range(3)])
    truth_V64 = test.y[kind]
    disc_V64 = truth_V64 > 0
    owner_64 = counts_3x64[1:].argmax(0) + 1
    return {
        "accuracy": float((truth_V64 == counts_3x64.argmax(0)).double().mean()),
        "accuracy_on_discs": float((truth_V64 == owner_64)[disc_V64].double().mean()),
    }


def measure_probes(
    models: Mapping[str, LanguageModel],
    games: Mapping[str, np.ndarray],
    config: ProbeConfig,
    *,
    seed: int,
    bench: Bench,
) -> Results:
    """Fit and score probes of every model and hook point; those of the first model are written.

    The first model is asked for both kinds of label, controls for "mine" alone: knowing nothing, they know neither better.

    Args:
        games: "train" and "test".
    """
    first, *controls = models
    work = [*((first, kind) for kind in LABELS), *((name, "mine") for name in controls)]
    steps = [(name, kind, hook) for name, kind in work for hook in hooks_of(models[name])]
    results: Results = {name: {} for name in models}
    examples: dict[str, dict[str, Examples]] = {}
    for name, lm in models.items():
        examples[name] = {
            split: collect(lm, games[split], per_game=config.per_game, seed=seed + number)
            for number, split in enumerate(("train", "test"))
        }

    def measure(name: str, kind: str, hook: str) -> Results:
        probes = fit_squares(examples[name]["train"], kind, hook, config.fit)
        if name == first:
            for square, probe in enumerate(probes):
                write_probe(probe, probe_directory(bench.directory, kind, square))
        return score_squares(probes, examples[name]["test"], kind)

    for name, kind, hook in bench.track(steps):
        of_kind = results[name].setdefault(kind, {})
        of_kind[hook] = bench.part(f"{name}.{kind}.{hook}", partial(measure, name, kind, hook))
    seen = examples[first]
    results["majority"] = {kind: majority(seen["train"], seen["test"], kind) for kind in LABELS}
    results["vectors"] = {split: len(seen[split].y["mine"]) for split in seen}
    return results


def probe_directory(directory: Path, kind: str, square: int) -> Path:
    """Where the probes of a square are."""
    return directory / kind / NAMES[square]


def read_probes(directory: Path, kind: str, hooks: Sequence[str]) -> dict[str, list[Probe]]:
    """The 64 probes of each hook point."""
    return {
        hook: [read_probe(probe_directory(directory, kind, square), hook=hook, kind=KIND) for square in range(64)]
        for hook in hooks
    }
