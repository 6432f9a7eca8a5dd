import errno
import re
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from ltm_pyro.data.pack import pack
from ltm_pyro.data.staging import staged
from ltm_pyro.errors import UsageError


def small(corpus, out, **settings):
    return pack([corpus], out, tokenizer="bpe:260", **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_pack_needs_force_and_is_then_replaced(corpus, tmp_path):
    out = tmp_path / "out"
    small(corpus, out, seq_len=8)
    before = contents(out)
    with pytest.raises(
        UsageError, match=re.escape(f"{out} already holds a pack; give --force to replace it or choose")
    ):
        small(corpus, out, seq_len=16)
    assert contents(out) == before
    assert small(corpus, out, seq_len=16, force=True).seq_len == 16
    assert contents(out) != before
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_replacement_keeps_the_old_pack(corpus, tmp_path):
    out = tmp_path / "out"
    small(corpus, out, seq_len=8)
    before = contents(out)
    with pytest.raises(UsageError, match="fewer than one sequence"):
        small(corpus, out, seq_len=10**6, rows="stream", force=True)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_pack_is_never_touched(corpus, tmp_path, force):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="out exists and is not a pack, so even --force does not replace it; choose"):
        small(corpus, tmp_path / "out", force=force)
    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_other_files_in_a_pack_are_not_deleted(corpus, tmp_path):
    small(corpus, tmp_path / "out")
    (tmp_path / "out/notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'notes.md' besides its pack, which --force would delete; move it"):
        small(corpus, tmp_path / "out", force=True)
    assert (tmp_path / "out/notes.md").exists()


def test_an_empty_folder_is_taken_and_a_file_is_not(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    small(corpus, tmp_path / "empty")
    assert (tmp_path / "empty/manifest.json").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file, which even --force does not replace"):
        small(corpus, tmp_path / "file", force=True)


def test_an_unwritable_place_is_named_with_its_reason(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=re.escape(f"cannot write {tmp_path}/file/out: Not a directory; make room")):
        small(corpus, tmp_path / "file/out")
    monkeypatch.setattr(Path, "mkdir", _raise(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(UsageError, match=re.escape(f"cannot write {tmp_path}/out: Read-only file system; make room")):
        small(corpus, tmp_path / "out")


def test_a_full_disk_is_named_and_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(TarWriter, "write", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UsageError, match=re.escape(f"cannot write {tmp_path}/out: No space left on device; make room")):
        small(corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(TarWriter, "write", _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        small(corpus, tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []


def test_an_old_pack_comes_back_if_the_move_fails(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small(corpus, out)
    before = contents(out)
    rename = Path.rename

    def failing(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match="Input/output error"):
        small(corpus, out, force=True)
    assert contents(out) == before
    monkeypatch.undo()
    small(corpus, out, force=True)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    writing = staged(out, force=False, settings={})
    writing.__enter__()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="out exists and is not a pack"):
        writing.__exit__(None, None, None)
    assert contents(out) == {"mine.txt": b"x"}


def _raise(error):
    def fail(*_, **__):
        raise error

    return fail
