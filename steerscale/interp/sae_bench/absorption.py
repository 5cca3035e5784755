"""Feature absorption on first letters (Chanin et al. 2024), a small form.

A latent that means "begins with s" is silent on some words with s, because a latent for these words carries the letter along.
For words that are one token, read at that token after a fixed prompt:

1. A logistic probe finds the first letter in the activation: the truth, and a direction for each letter.
2. The letter's main latents: those whose means are most above the rest's, taken in as long as the F1 of a logistic regression
   on them grows by more than 0.03 (feature splitting).
3. Among held-out words whose letter the probe gets right, a word is absorbed if all main latents are silent and one latent with
   a cosine of at least 0.025 to the probe's direction makes up at least 0.4 of the activation's projection on it.

The absorption fraction counts partial absorption: of the projection, the part of up to three latents with a cosine of at least
0.1, against the main latents' part. Thresholds of 2, 3 and the fraction are SAEBench 0.6's; other than there, latents are
picked by means and not by an L1 probe, and the prompt has no examples.

Shapes: V words, M d_model, N latents.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerscale.errors import DataError
from steerscale.interp.probes.activations import Encoded, Place
from steerscale.interp.probes.edit import direction
from steerscale.interp.probes.fit import FitConfig, fit_probe
from steerscale.interp.sae_bench.sparse_probing import CHUNK, FEW, chunks, distinctive_latents, latent_columns
from steerscale.language_model import LanguageModel
from steerscale.sae.weights import SAEWeights

PROMPT = "What is the first letter of the word"
MIN_WORDS = 20
"""Of a letter, on either side of the split, to be looked at."""
JUMP, MAX_SPLIT = 0.03, 10
COSINE, SHARE = 0.025, 0.4
FRACTION_COSINE, FRACTION_LATENTS = 0.1, 3


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """What was found about one letter."""

    letter: str
    words: int
    """Held-out words of the letter that the probe gets right."""
    absorbed: int
    """Of these."""
    fraction: float
    """Mean absorption fraction of these."""
    main: tuple[int, ...]
    """The letter's latents."""
    f1: float
    """Of the main latents, held-out."""
    probe_f1: float
    """Of the probe."""
    absorbing: tuple[int, ...]
    """Latents that took words over, the most frequent first."""

    @property
    def rate(self) -> float:
        """Share of the words that are absorbed."""
        return self.absorbed / self.words if self.words else 0.0

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rate": self.rate}


def first_letter_words(lm: LanguageModel, *, words: int, seed: int) -> list[Encoded]:
    """The prompt and a word, labelled with the word's first letter; words are entries of the vocabulary with a space before.

    Raises DataError if the vocabulary has fewer than 200.
    """
    prompt = lm.encode(PROMPT)
    tokens = []
    for token in range(lm.tokenizer.vocab_size):
        piece = lm.tokenizer.piece(token)
        word = piece[1:].lower() if piece[:1] in ("Ġ", "▁", " ") else ""
        if len(word) > 1 and all(letter in string.ascii_lowercase for letter in word):
            tokens.append((token, word[0]))
    if len(tokens) < 200:
        raise DataError(f"absorption needs words in the vocabulary, this tokenizer has {len(tokens)} of plain letters")
    random.Random(seed).shuffle(tokens)
    return [
        Encoded(tokens=(*prompt, token), places=(Place(len(prompt), len(prompt) + 1, letter, letter),))
        for token, letter in tokens[:words]
    ]


def absorption(
    sae: SAEWeights, x_VM: torch.Tensor, letters: Sequence[str], *, fit: FitConfig | None = None
) -> list[Absorption]:
    """One record a letter that has enough words. `x_VM`: at the words, in the order of `letters`; every second is held out.

    Raises DataError if fewer than two letters have.
    """
    counts = {letter: letters[0::2].count(letter) for letter in sorted(set(letters))}
    classes = tuple(letter for letter, count in counts.items() if min(count, letters[1::2].count(letter)) >= MIN_WORDS)
    if len(classes) < 2:
        raise DataError(f"absorption needs {2 * MIN_WORDS} words or more of two letters: read more words")
    index = {letter: number for number, letter in enumerate(classes)}
    sides = []
    for begin in (0, 1):
        y_V = torch.tensor([index.get(letter, -1) for letter in letters[begin::2]], device=x_VM.device)
        sides.append((x_VM[begin::2][y_V >= 0], y_V[y_V >= 0]))
    (train_VM, train_V), (test_VM, test_V) = sides
    fit = fit or FitConfig(per_coordinate=False)
    probe = fit_probe(train_VM, train_V, classes, hook="-", kind="logistic", config=fit)
    right_V = probe.logits(test_VM).argmax(dim=1)
    candidates_CK = distinctive_latents(sae, train_VM, train_V, len(classes), MAX_SPLIT, higher=True)
    columns = [latent_columns(sae, x_VM, candidates_CK.flatten().tolist()) for x_VM in (train_VM, test_VM)]
    rows_NM = sae.W_dec.float() / (sae.input_scale if sae.output_scale is None else sae.output_scale)
    found = []
    for letter, name in enumerate(classes):
        candidates, own = candidates_CK[letter].tolist(), slice(letter * MAX_SPLIT, (letter + 1) * MAX_SPLIT)
        train, test = ((part[:, own], (y_V == letter).long()) for part, y_V in zip(columns, (train_V, test_V)))
        number, best = _split(train, test)
        chosen = (test_V == letter) & (right_V == letter)
        way_M = direction(probe, letter)
        absorbing, fraction = _absorbing(sae, rows_NM, test_VM[chosen], candidates[:number], way_M / way_M.norm())
        ranked = sorted(set(absorbing), key=lambda latent: (-absorbing.count(latent), latent))
        found.append(
            Absorption(
                letter=name,
                words=int(chosen.sum()),
                absorbed=len(absorbing),
                fraction=fraction,
                main=tuple(candidates[:number]),
                f1=best,
                probe_f1=_f1(right_V == letter, test[1] == 1),
                absorbing=tuple(ranked[:5]),
            )
        )
    return found


def _split(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, float]:
    """(main latents, their F1)."""
    number, best = 1, -1.0
    for k in range(1, train[0].shape[1] + 1):
        probe = fit_probe(train[0][:, :k], train[1], ("rest", "letter"), hook="-", kind="logistic", config=FEW)
        f1 = _f1(probe.logits(test[0][:, :k]).argmax(dim=1) == 1, test[1] == 1)
        if k > 1 and f1 <= best + JUMP:
            break
        number, best = k, f1
    return number, best


def _absorbing(
    sae: SAEWeights, rows_NM: torch.Tensor, x_VM: torch.Tensor, main: Sequence[int], way_M: torch.Tensor
) -> tuple[list[int], float]:
    """For each absorbed word the latent that took it over; the mean absorption fraction of all words."""
    cosine_N = torch.nn.functional.cosine_similarity(rows_NM, way_M.unsqueeze(0), dim=1)
    found, fractions = [], []
    aligned_N = cosine_N >= FRACTION_COSINE
    aligned_N[list(main)] = False
    for part_VM, f_VN in zip(x_VM.split(CHUNK), chunks(sae, x_VM)):
        projection_V = part_VM @ way_M
        parts_VN = f_VN * (rows_NM @ way_M)
        best_V, top_V = parts_VN.max(dim=1)
        silent_V = (f_VN[:, list(main)] == 0).all(dim=1)
        taken_V = (projection_V > 0) & (cosine_N[top_V] >= COSINE) & (best_V >= SHARE * projection_V)
        found += top_V[silent_V & taken_V].tolist()
        main_V = parts_VN[:, list(main)].sum(dim=1)
        others_V = (parts_VN.clamp_min(0) * aligned_N).topk(FRACTION_LATENTS, dim=1).values.sum(dim=1)
        share_V = torch.minimum(others_V, projection_V - main_V)
        share_V = torch.where(main_V > 0, share_V / (share_V + main_V), 1.0)
        none_V = (main_V >= projection_V) | (others_V < SHARE * projection_V) | (projection_V <= 0)
        fractions += torch.where(none_V, 0.0, share_V).tolist()
    return found, sum(fractions) / max(len(fractions), 1)


def _f1(said_V: torch.Tensor, true_V: torch.Tensor) -> float:
    hits = float((said_V & true_V).sum())
    return 2 * hits / max(float(said_V.sum() + true_V.sum()), 1.0)
