import errno

import pytest

from steerscale.errors import DataError
from steerscale.tokenizers.directory import new_directory


def write(target, content, **options):
    with new_directory(target, **options) as directory:
        (directory / "manifest.json").write_text(content)


def test_appears_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_directory(target) as directory:
        (directory / "manifest.json").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["manifest.json"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaves_nothing_after_an_error(tmp_path, error):
    def interrupted():
        with new_directory(tmp_path / "target") as directory:
            (directory / "file").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_that_names_the_directory(tmp_path):
    def full():
        with new_directory(tmp_path / "target") as directory, (directory / "file").open("wb", buffering=0) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"target could not be written: .*No space left"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_replaced_with_force_alone(tmp_path):
    target = tmp_path / "target"
    write(target, "1")
    with pytest.raises(DataError, match="replace it with --force"):
        write(target, "2")
    assert (target / "manifest.json").read_text() == "1"
    write(target, "3", force=True)
    assert (target / "manifest.json").read_text() == "3"
    assert list(tmp_path.iterdir()) == [target]


def test_foreign_directory_is_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(DataError, match="was not written by steerscale"):
        write(tmp_path, "1", force=True)
    assert (tmp_path / "thesis.tex").exists()
