"""From labelled text to labelled activations: words aligned to tokens, one forward pass for many hook points.

Shapes: V labelled vectors, B sequences, S tokens, M d_model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.interp.interventions import capture
from steerscale.interp.probes.labels import Example
from steerscale.interp.probes.probe import POSITIONS
from steerscale.language_model import LanguageModel
from steerscale.models.hook_points import hook_point

BATCH_TOKENS = 2048
"""In one forward pass, padding included."""


class Place(NamedTuple):
    """A labelled vector: the mean over tokens begin .. end - 1 of a text, which mostly is one token."""

    begin: int
    end: int
    label: str
    type: str
    """Of a word as it is written, else of the last token: control tasks give a label to each type."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text's tokens and what is labelled in it."""

    tokens: tuple[int, ...]
    places: tuple[Place, ...]


def encode_examples(
    lm: LanguageModel, examples: Sequence[Example], *, position: str, vectors: int, drop_first: int = 1
) -> list[Encoded]:
    """Tokens and places of as many examples as give `vectors` places, in order; the last one is cut off there.

    Args:
        position: of a labelled span: its last token, its first, the mean over it, or all of them, each for itself.
        drop_first: first tokens of a sequence that are no places: activations there are outliers in most models.
    Words that share a token with others, and texts that decode to something else, are left out.
    Raises DataError if more than half of the texts with labelled words decode to something else, or no place is left.
    """
    require(position in POSITIONS, f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    require(vectors >= 1, f"the number of vectors must be at least 1, got {vectors}")
    found: list[Encoded] = []
    left, refused = vectors, 0
    for index, example in enumerate(examples):
        tokens = tuple(lm.encode(example.text)[: lm.seq_len])
        spans = _token_spans(lm, tokens, example)
        refused += spans is None
        if refused > 20 and refused > (index + 1) / 2:
            raise DataError(
                f"{refused} of {index + 1} texts decode to other words: this tokenizer changes text too much"
            )
        places = _places(lm, tokens, spans or [], position, drop_first)[:left]
        if places:
            found.append(Encoded(tokens=tokens[: places[-1].end], places=tuple(places)))
            left -= len(places)
        if not left:
            break
    if not found:
        raise DataError("no labelled token is left: texts are too short, or the tokenizer changes them")
    return found


def _places(
    lm: LanguageModel, tokens: Sequence[int], spans: Sequence[tuple[int, int, str, str]], position: str, drop_first: int
) -> list[Place]:
    places = []
    for begin, end, label, word in spans:
        begin = max(begin, drop_first) if position in ("mean", "all") else begin
        pairs = {
            "last": [(end - 1, end)],
            "first": [(begin, begin + 1)],
            "mean": [(begin, end)],
            "all": [(token, token + 1) for token in range(begin, end)],
        }[position]
        for first, after in pairs:
            if drop_first <= first < after:
                places.append(Place(first, after, label, word or lm.tokenizer.piece(tokens[after - 1])))
    return places


def _token_spans(lm: LanguageModel, tokens: Sequence[int], example: Example) -> list[tuple[int, int, str, str]] | None:
    """(first token, after the last, label, word or "") of each span that has tokens of its own; None if text was changed."""
    prefix = len(lm.prefix)
    if example.label is not None:
        return [(prefix, len(tokens), example.label, "")] if len(tokens) > prefix else []
    # Counted without spaces, about which tokenizers differ. An incomplete character is none yet.
    ends = [0]
    ends += [
        _solid(lm.tokenizer.decode(tokens[prefix:end]).rstrip("\ufffd")) for end in range(prefix + 1, len(tokens) + 1)
    ]
    whole = _solid(example.text)
    if ends != sorted(ends) or ends[-1] > whole or (ends[-1] < whole and len(tokens) < lm.seq_len):
        return None
    spans = []
    for span in example.spans:
        begin, end = _solid(example.text[: span.begin]), _solid(example.text[: span.end])
        if begin in ends and end in ends:
            # A token that adds nothing to the count, a space of its own, belongs to the word after it.
            first, after = ends.index(begin), ends.index(end)
            word = example.text[span.begin : span.end]
            spans.append((prefix + first, prefix + after, span.label, word))
    return spans


def _solid(text: str) -> int:
    return sum(not character.isspace() for character in text)


def collect(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    hooks: Sequence[str],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Activations float32 [V, M] on the CPU of every place, by hook point: on each rank of the stage that has it, alike.

    Args:
        on_progress: called with the tokens that have been read and their number.
    V x M x 4 bytes a hook point.
    """
    for hook in hooks:
        hook_point(hook, lm.model)
    starts, total = [], 0
    for one in encoded:
        starts.append(total)
        total += len(one.places)
    found: dict[str, torch.Tensor] = {}
    tokens, done = sum(len(one.tokens) for one in encoded), 0
    for rows in _batches(encoded):
        length = len(encoded[rows[0]].tokens)
        tokens_BS = torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens_BS[index, : len(encoded[row].tokens)] = torch.tensor(encoded[row].tokens)
        captured = capture(lm, tokens_BS.to(lm.context.device), hooks)
        index_n3, weight_n = _index(encoded, rows, starts)
        for hook, x_BSM in captured.items():
            if hook not in found:
                found[hook] = torch.zeros(total, x_BSM.shape[2])
            at = index_n3.to(x_BSM.device)
            part_nM = x_BSM[at[:, 0], at[:, 1]].float().cpu() * weight_n.unsqueeze(1)
            found[hook].index_add_(0, index_n3[:, 2], part_nM)
        done += sum(len(encoded[row].tokens) for row in rows)
        if on_progress is not None:
            on_progress(done, tokens)
    return found


def _batches(encoded: Sequence[Encoded]) -> Iterator[list[int]]:
    """Rows of similar length, the longest first; what a causal model sees of the padding behind a text is not read."""
    rows = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].tokens))
    while rows:
        number = max(BATCH_TOKENS // len(encoded[rows[0]].tokens), 1)
        yield rows[:number]
        rows = rows[number:]


def _index(encoded: Sequence[Encoded], rows: Sequence[int], starts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of the batch, token, vector) of every token that is read, and its weight in the vector."""
    index, weights = [], []
    for line, row in enumerate(rows):
        for number, place in enumerate(encoded[row].places):
            for token in range(place.begin, place.end):
                index.append((line, token, starts[row] + number))
                weights.append(1 / (place.end - place.begin))
    return torch.tensor(index), torch.tensor(weights)


def labels_of(encoded: Sequence[Encoded], classes: Sequence[str]) -> torch.Tensor:
    """int64 [V]: indices of `classes`, in the order of `collect`; -1 for a label that is none of them."""
    index = {name: number for number, name in enumerate(classes)}
    return torch.tensor([index.get(place.label, -1) for one in encoded for place in one.places])


def types_of(encoded: Sequence[Encoded]) -> list[str]:
    """V word types, in the same order."""
    return [place.type for one in encoded for place in one.places]
