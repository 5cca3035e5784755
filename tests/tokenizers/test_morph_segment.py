import gzip
import itertools
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest

from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.morph_align import place_morphemes
from steerscale.tokenizers.morph_lexicon import read_gold, read_lexicon, read_segmentations
from steerscale.tokenizers.morph_segment import byte_borders, cut_by, find_segmentation, write_segmentation

AFF = """SET UTF-8
FLAG long
AF 2
AF AaBb
AF Cc
PFX Pp Y 1
PFX Pp 0 ne .
SFX Aa Y 2
SFX Aa 0 s [^sy]
SFX Aa y ies [^aeiou]y
SFX Bb N 1
SFX Bb e ing e
SFX Cc Y 1
SFX Cc 0 ý/Zz [cd]
"""
DIC = "5\nwalk/1\ncity/1\nbake/BbPp\tpo:verb\nmlad/2\nklid/CcPp\n"


@pytest.fixture
def hunspell(tmp_path: Path) -> Path:
    (tmp_path / "x.aff").write_text(AFF)
    (tmp_path / "x.dic").write_text(DIC)
    return tmp_path / "x.dic"


@pytest.mark.parametrize(
    ("word", "morphemes", "cut"),
    [
        ("abonování", ["abon", "ová", "n", "í"], "abon ová n í"),
        ("subneural", ["sub", "neuron", "al"], "sub neur al"),
        ("ingenuities", ["ingenuity", "s"], "ingenuiti es"),
        ("happier", ["happy", "er"], "happi er"),
        ("a", ["a"], "a"),
        ("feet", ["foot", "s"], "feet"),
    ],
)
def test_morphemes_are_laid_onto_the_word(word: str, morphemes: list[str], cut: str) -> None:
    cuts = [0, *place_morphemes(word, morphemes), len(word)]
    assert " ".join(word[begin:end] for begin, end in itertools.pairwise(cuts)) == cut


def test_borders_lie_in_the_word_and_in_order() -> None:
    generator = random.Random(0)
    for _ in range(300):
        word = "".join(generator.choices("abc", k=generator.randrange(1, 9)))
        morphemes = ["".join(generator.choices("abc", k=generator.randrange(1, 4))) for _ in range(3)]
        borders = place_morphemes(word, morphemes)
        assert borders == sorted(set(borders))
        assert all(0 < border < len(word) for border in borders)


def test_byte_borders_count_bytes() -> None:
    assert byte_borders("žádáno", lambda word: [3, 4, 5], offset=1) == [6, 8, 9]


def test_sigmorphon_and_morphynet_tables(tmp_path: Path) -> None:
    sigmorphon = tmp_path / "gold.tsv.xz"
    sigmorphon.write_bytes(lzma.compress("žádáno\tžád @@á @@n @@o\npatronesses\tpatron @@ess @@s\t110\n".encode()))
    assert list(read_lexicon(sigmorphon)("žádáno")) == [3, 4, 5]
    assert list(read_lexicon(sigmorphon)("unknown")) == []
    assert read_gold(sigmorphon)["patronesses"] == ["patron", "ess", "s"]
    inflections = tmp_path / "inflections.tsv.gz"
    inflections.write_bytes(gzip.compress(b"abandon\tabandoned\tV|PST\tabandon|ed\nbe\twas\tV|PST\t-\n"))
    assert list(read_lexicon(inflections)("abandoned")) == [7]
    derivations = tmp_path / "derivations.tsv"
    derivations.write_text("happy\tunhappy\tJ\tJ\tun\tprefix\nhappy\thappiness\tJ\tN\tness\tsuffix\n")
    lexicon = read_lexicon(derivations)
    assert (list(lexicon("unhappy")), list(lexicon("happiness"))) == ([2], [5])


def test_hunspell_rules_are_read_backwards(hunspell: Path) -> None:
    lexicon = read_lexicon(hunspell)
    found = {
        word: list(lexicon(word)) for word in ("walks", "cities", "baking", "mladý", "nebake", "neklidý", "nebaking")
    }
    assert found == {
        "walks": [4], "cities": [3], "baking": [3], "mladý": [4], "nebake": [2], "neklidý": [2, 6], "nebaking": [],
    }  # fmt: skip
    assert [list(lexicon(word)) for word in ("walk", "citys", "mlads", "s", "")] == [[]] * 5


def test_own_table_must_spell_the_word(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("running\trunn ing\nRunner\tRun n er\n")
    assert read_segmentations(path) == {"running": [4], "Runner": [3, 4]}
    segmentation = find_segmentation(str(path), {})
    assert (list(segmentation("RUNNING")), list(segmentation("Runner")), list(segmentation("runner"))) == (
        [4],
        [3, 4],
        [],
    )
    assert cut_by(read_segmentations(path))("running") == [b"runn", b"ing"]
    path.write_text("ingenuities\tingenuity s\n")
    with pytest.raises(DataError, match=r"is not 'ingenuities'; for morphemes in dictionary form write lexicon:"):
        find_segmentation(str(path), {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\tc\td\te\n", "line 1: 5 columns"),
        ("a.tsv", "word\n", "line 1: 1 columns"),
        ("a.tsv.xz", "no xz", "cannot be read as a table"),
        ("a.dic", "1\nx\n", r"a.aff cannot be read as a hunspell dictionary"),
    ],
)
def test_bad_lexicons(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        find_segmentation(f"lexicon:{tmp_path / name}", {})


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give morfessor, lexicon:FILE"):
        find_segmentation("morphessor", {})
    with pytest.raises(DataError, match="cannot be read as a table of morphemes"):
        find_segmentation(str(tmp_path / "none.tsv"), {})
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(DataError, match="holds no words"):
        find_segmentation(str(tmp_path / "empty.tsv"), {})
    (tmp_path / "columns.tsv").write_text("word\t \n")
    with pytest.raises(DataError, match="line 1: expected a word, a tab and its morphemes"):
        find_segmentation(str(tmp_path / "columns.tsv"), {})


STEMS = ["install", "packag", "comput", "render", "print", "start", "configur", "search", "load", "record"]
WORDS = {stem + end: 3 for stem in STEMS for end in ("", "ed", "ing", "er", "ers", "able")}


def test_morfessor_finds_endings_and_is_the_same_in_every_process(tmp_path: Path) -> None:
    pytest.importorskip("morfessor", reason="the extra `morph` is not installed")
    state = random.getstate()
    segmentation = find_segmentation("morfessor", {**WORDS, "3.5": 2, "x-y": 1})
    assert random.getstate() == state
    assert list(segmentation("loading")) == list(segmentation("Loading")) == [4]
    assert list(segmentation("3.5")) == []
    assert write_segmentation(tmp_path / "here.tsv", WORDS, segmentation) > 30
    for seed in ("1", "2"):
        command = (
            "from pathlib import Path; from tests.tokenizers.test_morph_segment import *; "
            f"write_segmentation(Path({str(tmp_path / seed)!r}), WORDS, find_segmentation('morfessor', WORDS))"
        )
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(["", *sys.path])}
        subprocess.run([sys.executable, "-c", command], env=environment, check=True)
        assert (tmp_path / seed).read_bytes() == (tmp_path / "here.tsv").read_bytes()


def test_morfessor_leaves_out_what_is_too_long_to_be_a_word() -> None:
    pytest.importorskip("morfessor", reason="the extra `morph` is not installed")
    segmentation = find_segmentation("morfessor", {**WORDS, "loading" * 30: 1})
    assert list(segmentation("loading")) == [4]
    assert list(segmentation("loading" * 30)) == []


def test_missing_morfessor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "morfessor", None)
    with pytest.raises(ConfigError, match=r"pip install 'steerscale\[morph\]'"):
        find_segmentation("morfessor", WORDS)
