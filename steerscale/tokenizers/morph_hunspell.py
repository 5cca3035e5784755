"""Borders of affixes from a hunspell dictionary: which stem and which rules make a word, read backwards.

Hunspell's rules are for spelling, not for morphology: what they add is not always a morpheme, and stems are not cut.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from steerscale.errors import DataError

SHORTEST_STEM = 2
"""Letters that must be left of a word without its affix."""


class Rule(NamedTuple):
    """An affix: replace `strip` by `add` where the stem meets the condition."""

    flag: str
    suffix: bool
    crosses: bool
    """Whether it goes with an affix at the other end."""
    strip: str
    add: str
    condition: re.Pattern[str]


class Affixes(NamedTuple):
    """What an .aff file says, as far as it matters here."""

    split: Callable[[str], list[str]]
    """The flags of a dictionary entry, one by one."""
    encoding: str
    rules: dict[tuple[bool, str], list[Rule]]
    """(suffix, add) -> rules."""


def read_hunspell(dictionary: Path) -> Callable[[str], Sequence[int]]:
    """The borders of a word by the dictionary and the .aff file beside it; () if no rule makes it.

    Raises DataError if one of the two cannot be read.
    """
    try:
        affixes = _read_affixes(dictionary.with_suffix(".aff"))
        text = dictionary.read_bytes().decode(affixes.encoding, errors="replace")
    except (OSError, LookupError, ValueError, re.error) as error:
        raise DataError(
            f"{dictionary} and {dictionary.with_suffix('.aff').name} cannot be read as a hunspell dictionary: {error}"
        ) from error
    stems: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines()[1:]:
        entry, *_ = line.split("\t")[0].split(" ")
        stem, _, flags = entry.partition("/")
        if stem:
            stems[stem].update(affixes.split(flags))
    longest = max((len(add) for _, add in affixes.rules), default=0)
    return lambda word: _borders(word, stems, affixes.rules, longest)


def _borders(
    word: str, stems: dict[str, set[str]], rules: dict[tuple[bool, str], list[Rule]], longest: int
) -> list[int]:
    suffixes = list(_undo(word, rules, longest, suffix=True))
    for rule, stem in suffixes:
        if rule.flag in stems.get(stem, ()):
            return [len(word) - len(rule.add)]
    for prefix, rest in _undo(word, rules, longest, suffix=False):
        border = len(prefix.add)
        if prefix.flag in stems.get(rest, ()):
            return [border]
        for rule, stem in _undo(rest, rules, longest, suffix=True):
            if rule.crosses and prefix.crosses and {rule.flag, prefix.flag} <= stems.get(stem, set()):
                return [border, len(word) - len(rule.add)]
    return []


def _undo(
    word: str, rules: dict[tuple[bool, str], list[Rule]], longest: int, *, suffix: bool
) -> Iterator[tuple[Rule, str]]:
    """Rules that may have made the word, longest affix first, and the stem that each would have made it of."""
    for length in range(min(longest, len(word) - SHORTEST_STEM), 0, -1):
        add = word[-length:] if suffix else word[:length]
        for rule in rules.get((suffix, add), ()):
            stem = word[:-length] + rule.strip if suffix else rule.strip + word[length:]
            if rule.condition.search(stem):
                yield rule, stem


def _read_affixes(path: Path) -> Affixes:
    data = path.read_bytes()
    named = re.search(rb"^(?:\xef\xbb\xbf)?SET\s+(\S+)", data, re.MULTILINE)
    encoding = named[1].decode("ascii").replace("microsoft-cp", "cp") if named else "latin-1"
    rules: dict[tuple[bool, str], list[Rule]] = defaultdict(list)
    kind, aliases, crossing = "", [], {}
    for line in data.decode(encoding, errors="replace").splitlines():
        fields = line.split()
        if fields[:1] == ["FLAG"]:
            kind = fields[1]
        elif fields[:1] == ["AF"]:
            aliases.append(fields[1])
        elif fields[:1] in (["SFX"], ["PFX"]) and len(fields) == 4 and fields[2] in "YN" and fields[3].isdecimal():
            crossing[fields[0], fields[1]] = fields[2] == "Y"
        elif fields[:1] in (["SFX"], ["PFX"]) and len(fields) >= 4:
            rule = _rule(fields, crosses=crossing.get((fields[0], fields[1]), False))
            if rule.add:
                rules[rule.suffix, rule.add].append(rule)

    def split(flags: str) -> list[str]:
        if aliases and flags.isdecimal() and int(flags) < len(aliases):
            flags = aliases[int(flags)]  # number 0 is the line that says how many there are
        if kind == "num":
            return flags.split(",")
        step = 2 if kind == "long" else 1
        return [flags[at : at + step] for at in range(0, len(flags), step)]

    return Affixes(split, encoding, dict(rules))


def _rule(fields: list[str], *, crosses: bool) -> Rule:
    suffix = fields[0] == "SFX"
    strip, add = (text if text != "0" else "" for text in (fields[2], fields[3].split("/")[0]))
    condition = fields[4] if len(fields) > 4 and not fields[4].startswith(("is:", "po:", "ds:")) else "."
    pattern = "" if condition == "." else condition.replace("-", r"\-")
    return Rule(fields[1], suffix, crosses, strip, add, re.compile(f"{pattern}$" if suffix else f"^{pattern}"))
