"""Checkpoint directories: whole or not there, and a damaged one is told from a whole one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from steerscale.checkpoint.store import checkpoints, find_damage
from steerscale.testing.ranks import RankPool
from tests.checkpoint.stores import latest, resume_and_save, save, save_while_training, save_with_broken_rank
from tests.disks import small_disk

RANK_FILE = "rank_00001.safetensors"


@pytest.fixture
def saved(pool: RankPool, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, by two ranks."""
    directory = tmp_path / "checkpoints"
    (written, _), _ = pool.run(save, directory, [1, 2], {}, ranks=2)
    assert written == [True, True]
    return directory


def names(directory: Path) -> list[str]:
    """Names of everything there, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


def flip(path: Path, position: int) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_manifest(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest's content."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    """Cut off the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (lambda c: truncate(c / RANK_FILE), f"{RANK_FILE} has 4079 bytes instead of 4080"),
    "flipped tensor bit": (lambda c: flip(c / RANK_FILE, -7), f"{RANK_FILE} has another SHA-256"),
    "flipped tensor bit of rank 0": (lambda c: flip(c / "rank_00000.safetensors", -7), "rank_00000.* another SHA-256"),
    "flipped index bit": (lambda c: flip(c / "index.json", 30), "index.json has another SHA-256"),
    "flipped state bit": (lambda c: flip(c / "state.json", 3), "state.json has another SHA-256"),
    "missing tensors": (lambda c: (c / RANK_FILE).unlink(), f"{RANK_FILE} is missing"),
    "missing state": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be read"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "binary manifest": (lambda c: (c / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json cannot be read"),
    "list as manifest": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json cannot be read: TypeError"),
    "no files": (lambda c: edit_manifest(c, lambda m: m["files"].clear()), "does not name index.json and state.json"),
    "files as list": (lambda c: edit_manifest(c, lambda m: m.update(files=["a"])), "manifest.json cannot be read"),
    "file without size": (
        lambda c: edit_manifest(c, lambda m: m["files"][RANK_FILE].pop("bytes")),
        "manifest.json cannot be read: KeyError",
    ),
    "another step": (lambda c: c.rename(c.with_name("step_00000003")), "manifest.json is of step 2"),
    "newer format": (lambda c: edit_manifest(c, lambda m: m.update(format_version=2)), "reads version 1"),
    "directory as file": (lambda c: ((c / RANK_FILE).unlink(), (c / RANK_FILE).mkdir()), f"{RANK_FILE} is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(pool: RankPool, saved: Path, damage: str) -> None:
    action, problem = DAMAGES[damage]
    (found, log), _ = pool.run(latest, saved, {}, ranks=2)
    assert (found, log) == ("step_00000002", "")
    action(saved / "step_00000002")
    (found, log), (elsewhere, _) = pool.run(latest, saved, {}, ranks=2)
    assert found == elsewhere == "step_00000001"
    (line,) = [line for line in log.splitlines() if "is damaged" in line]
    assert re.search(rf"step_0000000[23] is damaged \(.*{problem}", line), line


def test_find_damage_divides_the_files_among_ranks(saved: Path) -> None:
    checkpoint = saved / "step_00000002"
    flip(checkpoint / RANK_FILE, -1)
    found = [find_damage(checkpoint, share=(rank, 4)) for rank in range(4)]
    assert [problem is None for problem in found].count(False) == 1
    assert find_damage(checkpoint) is not None


def test_unverified_store_finds_sizes_only(pool: RankPool, saved: Path) -> None:
    flip(saved / "step_00000002" / RANK_FILE, -1)
    ((found, _),) = pool.run(latest, saved, {"verify": False}, ranks=1)
    assert found == "step_00000002"
    truncate(saved / "step_00000002" / RANK_FILE)
    ((found, _),) = pool.run(latest, saved, {"verify": False}, ranks=1)
    assert found == "step_00000001"


def test_nothing_but_damaged_checkpoints_is_an_error(pool: RankPool, saved: Path) -> None:
    before = names(saved)
    truncate(saved / "step_00000001" / RANK_FILE)
    (saved / "step_00000002" / "manifest.json").unlink()
    for found, _ in pool.run(latest, saved, {}, ranks=2):
        assert found is not None
        assert found.startswith(f"error: {saved} holds no usable checkpoint: step_00000002: manifest.json")
        assert "step_00000001: rank_00001.safetensors has" in found
        assert "or remove this directory to begin anew" in found
    assert names(saved) == before


def test_pointer_to_a_missing_checkpoint_is_told(pool: RankPool, saved: Path) -> None:
    (saved / "step_00000002").rename(saved / "elsewhere")
    ((found, log),) = pool.run(latest, saved, {}, ranks=1)
    assert found == "step_00000001"
    assert "step_00000002 is missing, although latest names it" in log
    (saved / "step_00000001").rename(saved / "elsewhere2")
    ((found, _),) = pool.run(latest, saved, {}, ranks=1)
    assert found is not None
    assert found.startswith("error: ")
    assert "step_00000002: it is missing" in found


def test_new_directory_has_no_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(latest, tmp_path / "new", {}, ranks=2) == [(None, ""), (None, "")]


def test_leftovers_are_removed_and_other_names_left_alone(pool: RankPool, saved: Path) -> None:
    for name in (".writing_00000009", ".writing_step_00000008", "step_00000002.bak", "step_latest", "notes"):
        (saved / name).mkdir()
        (saved / name / "file").touch()
    ((found, log),) = pool.run(latest, saved, {}, ranks=1)
    assert (found, log) == ("step_00000002", "")
    ((written, _),) = pool.run(save, saved, [3, 4], {"keep": 1}, ranks=1)
    assert written == [True, True]
    assert names(saved) == ["latest", "notes", "step_00000002.bak", "step_00000004", "step_latest"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep": 2}, [7, 8]),
        ({"keep": 1}, [8]),
        ({"keep": 0}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep": 2, "keep_every": 3}, [3, 6, 7, 8]),
        ({"keep": 1, "keep_every": 4}, [4, 8]),
    ],
)
def test_retention(pool: RankPool, tmp_path: Path, settings: dict[str, int], kept: list[int]) -> None:
    pool.run(save, tmp_path, range(1, 9), settings, ranks=1)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in kept)]
    assert (tmp_path / "latest").read_text() == "step_00000008\n"


def test_damaged_checkpoints_do_not_count_as_kept(pool: RankPool, saved: Path) -> None:
    truncate(saved / "step_00000002" / RANK_FILE)
    pool.run(resume_and_save, saved, 3, {"keep": 2}, ranks=2)
    assert names(saved) == ["latest", "step_00000001", "step_00000002", "step_00000003"]


def test_damaged_checkpoint_is_replaced_by_a_whole_one(pool: RankPool, saved: Path) -> None:
    truncate(saved / "step_00000002" / RANK_FILE)
    pool.run(resume_and_save, saved, 2, {"keep": 1}, ranks=2)
    assert names(saved) == ["latest", "step_00000002"]
    assert find_damage(saved / "step_00000002") is None


def test_steps_beyond_eight_digits_are_in_order(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save, tmp_path, [99_999_999, 100_000_000], {"keep": 1}, ranks=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_100000000"]


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_rank_that_fails_to_save_fails_the_checkpoint_on_all(
    pool: RankPool, saved: Path, broken: int, asynchronous: bool
) -> None:
    answers = pool.run(save_with_broken_rank, saved, broken, asynchronous, ranks=2)
    assert [answer[:2] for answer in answers] == [(False, False)] * 2
    first, second = answers[0][2].splitlines()
    assert f"step 1 was not written: rank {broken}: MemoryError: no room for a copy; older" in first
    assert f"step 2 was not written: rank {broken}: OSError: [Errno 5] Input/output error" in second
    assert "untouched: step_00000001, step_00000002" in second
    assert names(saved) == ["latest", "step_00000001", "step_00000002"]


def test_asynchronous_checkpoint_holds_the_state_of_its_step(pool: RankPool, tmp_path: Path) -> None:
    for pending, newest, half_done, done, same in pool.run(save_while_training, tmp_path, ranks=2):
        assert pending == [".writing_00000001"]  # nothing visible while it is written
        assert (newest, half_done, done) == (None, None, 1)
        assert same
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_trouble_after_publishing_is_no_failure(pool: RankPool, saved: Path) -> None:
    (saved / "latest").unlink()
    (saved / "latest").mkdir()  # the pointer cannot be written
    ((written, log),) = pool.run(save, saved, [3], {}, ranks=1)
    assert written == [True]
    assert "step 3 is whole, but tidying up after it failed" in log
    ((found, _),) = pool.run(latest, saved, {}, ranks=1)
    assert found == "step_00000003"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_full_disk_fails_the_save_and_leaves_older_checkpoints(
    pool: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    settings = {"asynchronous": asynchronous, "keep": 1}
    elements = 80_000  # of 4 bytes on 2 ranks: one checkpoint fits, a second one beside it does not
    with small_disk(tmp_path / "disk", kib=1024) as disk:
        for written, _ in pool.run(save, disk, [1], settings, elements, ranks=2):
            assert written == [True]
        first, other = pool.run(save, disk, [2, 3], settings, elements, ranks=2)
        assert first[0] == other[0] == [False, False]
        assert first[1].count("No space left on device") == 2
        assert "the checkpoint of step 2 was not written: rank" in first[1]
        assert "older ones are untouched: step_00000001" in first[1]
        assert names(disk) == ["latest", "step_00000001"]
        assert find_damage(disk / "step_00000001") is None
