"""Labels for probes, from files: tagged words, parallel text, texts or words with labels of one's own.

Torch-free. A file may be compressed (.xz, .gz, .zst).
"""

import codecs
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from steerscale.data.sources import find_sources, read_chunks
from steerscale.errors import ConfigError, DataError

TASKS = ("pos", "language")
"""Tasks with a format of their own; everything else is a .tsv or .jsonl file of labels."""


class Span(NamedTuple):
    """A labelled part of a text."""

    begin: int
    """First character."""
    end: int
    """After the last."""
    label: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text with labels."""

    text: str
    spans: tuple[Span, ...] = ()
    """Of words."""
    label: str | None = None
    """Of the whole text, where there are no spans."""
    spurious: str | None = None
    """Another attribute of the whole text, which `sae_bench.scr` removes."""
    group: int = 0
    """Examples of one group are on the same side of the split: translations of one sentence, say."""


def read_examples(
    task: str, *, path: Path | None = None, classes: Sequence[str] = (), tagset: str = "universal"
) -> list[Example]:
    """The examples of a task.

    Args:
        task: pos (lines of word/TAG), language (lines of tab-separated columns, the last of which are `classes`), or the path
            of a .tsv file with a header and columns text and label, or of a .jsonl file with {"text", "label"} or
            {"words", "labels"}.
        path: of pos and language.
        classes: of language.
        tagset: of pos: universal (12 classes, from the Brown corpus's tags), or as-written.
    Raises:
        ConfigError: a task without its file, or no such tagset.
        DataError: the file cannot be read, is not like that, or holds no example.
    """
    if task in TASKS and path is None:
        raise ConfigError(f"the task {task!r} needs a file: name it with --data")
    if task not in TASKS and path is not None:
        raise ConfigError(f"--data {path} belongs to the tasks {', '.join(TASKS)}; got the task {task!r}")
    if task == "pos" and path is not None:
        examples = list(_read_tagged(path, tagset))
    elif task == "language" and path is not None:
        examples = list(_read_parallel(path, classes))
    else:
        examples = list(_read_labelled(Path(task)))
    if not examples:
        raise DataError(f"{path or task} holds no example")
    return examples


def split_examples(examples: Sequence[Example], *, seed: int, held_out: float) -> tuple[list[Example], list[Example]]:
    """Shuffled groups, a share of them held out: (training, held-out). Raises DataError if that leaves one side empty."""
    groups = sorted({example.group for example in examples})
    random.Random(seed).shuffle(groups)
    number = min(max(round(len(groups) * held_out), 1), len(groups) - 1)
    if number < 1:
        raise DataError("one example alone cannot be split into training and held-out: give more")
    place = {group: index for index, group in enumerate(groups)}
    ordered = sorted(examples, key=lambda example: place[example.group])
    return (
        [example for example in ordered if place[example.group] >= number],
        [example for example in ordered if place[example.group] < number],
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end)."""
    (source,) = find_sources([str(path)], format="txt")
    decoder, rest, number = codecs.getincrementaldecoder("utf-8")(), "", 0
    try:
        for chunk, _ in read_chunks(source):
            *whole, rest = (rest + decoder.decode(chunk)).split("\n")
            for line in whole:
                number += 1
                yield number, line.removesuffix("\r")
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 after line {number}: {error}") from error
    if rest:
        yield number + 1, rest.removesuffix("\r")


def _read_tagged(path: Path, tagset: str) -> Iterator[Example]:
    if tagset not in ("universal", "as-written"):
        raise ConfigError(f"the tagset must be universal or as-written, got {tagset!r}")
    for number, line in _lines(path):
        if not line.strip():
            continue
        words, labels = [], []
        for token in line.split():
            word, slash, tag = token.rpartition("/")
            if not slash or not word or not tag:
                raise DataError(f"{path}, line {number}: {token!r} is no word/TAG")
            words.append(word)
            labels.append(universal_tag(tag) if tagset == "universal" else tag)
        yield _of_words(words, labels, group=number)


def _of_words(words: Sequence[str], labels: Sequence[str], *, group: int) -> Example:
    """Words as a text that reads like one: punctuation has its spaces where people put them."""
    text, spans, glued = "", [], True
    for word, label in zip(words, labels):
        opens, closes = word in ("``", "(", "["), word in ("''", ")", "]", ".", ",", ";", ":", "?", "!")
        word = '"' if word in ("``", "''") else word
        text += "" if glued or closes else " "
        spans.append(Span(len(text), len(text) + len(word), label))
        text += word
        glued = opens
    return Example(text=text, spans=tuple(spans), group=group)


def _read_parallel(path: Path, classes: Sequence[str]) -> Iterator[Example]:
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ConfigError(f"language id needs two or more classes that differ, got {', '.join(classes) or 'none'}")
    for number, line in _lines(path):
        columns = line.split("\t")
        if len(columns) < len(classes):
            raise DataError(
                f"{path}, line {number}: {len(columns)} columns, expected one for each of {', '.join(classes)} at the end"
            )
        for name, text in zip(classes, columns[-len(classes) :]):
            if text.strip():
                yield Example(text=text, label=name, group=number)


def _read_labelled(path: Path) -> Iterator[Example]:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".xz", ".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".tsv", ".jsonl"):
        raise ConfigError(f"the task must be {', '.join(TASKS)}, or a .tsv or .jsonl file of labels; got {str(path)!r}")
    if kind == ".jsonl":
        for number, line in _lines(path):
            if line.strip():
                yield _of_json(line, f"{path}, line {number}", group=number)
        return
    lines = _lines(path)
    header = next(lines, (1, ""))[1].split("\t")
    if not {"text", "label"} <= set(header):
        raise DataError(f"{path} must begin with a header that names the columns text and label, got {header}")
    for number, line in lines:
        row = line.split("\t")
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {len(row)} columns where the header has {len(header)}")
        found = dict(zip(header, row))
        if found["text"].strip():
            yield Example(text=found["text"], label=found["label"], group=number)


def _of_json(line: str, at: str, *, group: int) -> Example:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{at} is no JSON: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("text"), str) and values.get("label") is not None:
        spurious = values.get("spurious")
        return Example(
            text=values["text"],
            label=str(values["label"]),
            spurious=None if spurious is None else str(spurious),
            group=group,
        )
    if isinstance(values, dict) and isinstance(values.get("words"), list) and isinstance(values.get("labels"), list):
        words, labels = [str(word) for word in values["words"]], [str(label) for label in values["labels"]]
        if len(words) != len(labels) or not words:
            raise DataError(f"{at}: {len(words)} words and {len(labels)} labels")
        return _of_words(words, labels, group=group)
    raise DataError(f'{at} must be {{"text": ..., "label": ...}} or {{"words": [...], "labels": [...]}}')


_UNIVERSAL = {
    "ADJ": ("ap", "jj", "jjr", "jjs", "jjt", "od"),
    "ADP": ("cs", "in"),
    "ADV": ("nr", "ql", "qlp", "rb", "rbr", "rbt", "rn", "wql", "wrb"),
    "CONJ": ("cc",),
    "DET": ("abl", "abn", "abx", "at", "dt", "dti", "dts", "dtx", "pp$", "wdt", "wp$"),
    "NOUN": ("nn", "nn$", "nns", "nns$", "np", "np$", "nps", "nps$", "nr$", "nrs"),
    "NUM": ("cd", "cd$"),
    "PRON": ("ex", "pn", "pn$", "pp$$", "ppl", "ppls", "ppo", "pps", "ppss", "wpo", "wps"),
    "PRT": ("*", "rp", "to"),
    "VERB": (
        *("be", "bed", "bedz", "beg", "bem", "ben", "ber", "bez", "do", "dod", "doz", "hv", "hvd", "hvg", "hvn", "hvz"),
        *("md", "vb", "vbd", "vbg", "vbn", "vbz"),
    ),
    "X": ("fw", "nil", "uh"),
    ".": (".", ",", ":", "(", ")", "--", "``", "''", "'"),
}
_UNIVERSAL_OF = {tag: name for name, tags in _UNIVERSAL.items() for tag in tags}


@cache
def universal_tag(tag: str) -> str:
    """The class, of 12 in the manner of Petrov et al. 2012, of a tag of the Brown corpus; X for what it has not.

    Headline and title marks are dropped, a contraction has the class of its first part, a negated verb is a verb, and a foreign
    word is X.
    """
    tag = tag.lower()
    if tag.startswith("fw-"):
        return "X"
    tag = tag.partition("+")[0]
    while tag.endswith(("-tl", "-hl", "-nc")):
        tag = tag[:-3]
    return _UNIVERSAL_OF.get(tag if len(tag) == 1 else tag.rstrip("*"), "X")
