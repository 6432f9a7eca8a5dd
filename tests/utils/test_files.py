"""A file is written whole or not at all, by any number of processes at once."""

import shutil

import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write, writing


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def test_the_old_file_stays_until_the_new_one_is_whole(path):
    with atomic_write(path) as new:
        new.write_text("half")
        assert path.read_text() == "old"
        new.write_text("whole")
    assert path.read_text() == "whole"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", ["nothing", "a file", "a folder"])
def test_a_failure_leaves_the_old_file_and_nothing_else(path, error, written):

    def write(new):
        if written == "a folder":
            new.mkdir()
        if written != "nothing":
            (new / "part" if new.is_dir() else new).write_text("half")
        raise error

    with pytest.raises(error), atomic_write(path) as new:
        write(new)
    assert path.read_text() == "old"
    assert [*path.parent.iterdir()] == [path]


def test_several_write_the_same_file(path):
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        other.write_text("other")
        one.write_text("one")
    assert path.read_text() == "one"  # the block that ended last


def test_what_was_not_written_replaces_nothing(path):
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert path.read_text() == "old"


def test_the_reason_and_the_option_are_named(path):
    message = f"Cannot write {path}/below: Not a directory; make room there or choose another --svg."
    with pytest.raises(UsageError) as refused, writing(path / "below", "--svg"), atomic_write(path / "below") as new:
        new.write_text("")
    assert str(refused.value) == message
    assert path.read_text() == "old"


def test_a_folder_is_removed_first(path):
    path.unlink()
    for content in ("one", "two"):
        with atomic_write(path) as new:
            new.mkdir()
            (new / content).touch()
            shutil.rmtree(path, ignore_errors=True)
    assert [x.name for x in path.iterdir()] == ["two"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
