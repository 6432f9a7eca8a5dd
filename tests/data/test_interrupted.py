"""An interrupted pack is resumed, and ends as if nothing had happened."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from webdataset.writer import TarWriter

from ltm_pyro.data.pack import pack
from ltm_pyro.data.rows import Cutter
from ltm_pyro.data.staging import staged
from ltm_pyro.errors import UsageError

SETTINGS = {"tokenizer": "bpe:300", "seq_len": 16, "val_fraction": 0.2, "shard_rows": 20}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class StopError(Exception):
    pass


@pytest.mark.parametrize("end", [StopError, KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
@pytest.mark.parametrize("after", [1, 4, 5])
def test_the_same_call_goes_on_and_writes_the_same_bytes(corpus, tmp_path, monkeypatch, after, end):
    whole = pack([corpus], tmp_path / "whole", **SETTINGS)
    told, encoded = [], []
    original = Cutter.add

    def add(self, piece):
        encoded.append(piece.number)
        return original(self, piece)

    def tell(tokens):
        told.append(tokens)
        if len(told) == after:
            raise end

    with pytest.raises((StopError, KeyboardInterrupt, UsageError)) as caught:
        pack([corpus], tmp_path / "out", **SETTINGS, progress=tell)
    if caught.type is not StopError:
        assert f"{after} shards are finished: the same command goes on from there." in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Cutter, "add", add)
    told.clear()
    again = pack([corpus], tmp_path / "out", **SETTINGS, progress=told.append)
    assert again == whole
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sum(told) == sum(split.tokens for split in whole.splits.values())
    assert len(set(encoded)) < 60  # what was written is not encoded again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_other_settings_or_input_begin_anew(corpus, tmp_path, monkeypatch):
    def stop(tokens):
        raise StopError

    with pytest.raises(StopError):
        pack([corpus], tmp_path / "out", **SETTINGS, progress=stop)
    other = SETTINGS | {"seq_len": 8}
    pack([corpus], tmp_path / "whole", **other)
    assert pack([corpus], tmp_path / "out", **other).seq_len == 8
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def leave(out, content=None):
    """Stages a pack of one shard, or looks at what is staged; stops in its middle."""
    with staged(out, False, {"a": 1}) as staging:
        if content:
            (staging.folder / "train-000000.tar").write_bytes(content)
            staging.add(ENTRY)
        found.append((staging.folder, [*staging.entries]))
        raise StopError


ENTRY = {"shard": {"file": "train-000000.tar", "size": 3}}
found = []


def test_a_journal_cut_in_a_line_counts_to_the_line_before(tmp_path):
    with pytest.raises(StopError):
        leave(tmp_path / "out", b"abc")
    folder, _ = found[-1]
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"shard": {"fi')
    with pytest.raises(StopError):
        leave(tmp_path / "out")
    assert found[-1] == (folder, [ENTRY])
    assert [json.loads(line) for line in journal.read_text().splitlines()] == [{"a": 1}, ENTRY]
    (folder / "train-000000.tar").write_bytes(b"ab")
    with pytest.raises(StopError):
        leave(tmp_path / "out")
    assert found[-1] == (folder, [])


def test_what_a_killed_process_has_not_finished_is_removed(tmp_path):
    with pytest.raises(StopError):
        leave(tmp_path / "out", b"abc")
    folder, _ = found[-1]
    for name in ("train-000001.tar.0123456789ab.new", "train-000001.tar", "tokenizer.json"):
        (folder / name).write_bytes(b"half")
    with pytest.raises(StopError):
        leave(tmp_path / "out")
    assert found[-1] == (folder, [ENTRY])
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl", "tokenizer.json", "train-000000.tar"]


def test_two_packs_to_one_place_do_not_mix(corpus, tmp_path):
    with staged(tmp_path / "out", False, {}) as staging:
        with pytest.raises(UsageError, match="another process is packing to"):
            pack([corpus], tmp_path / "out", **SETTINGS)
        assert staging.folder.exists()


def test_a_full_disk_during_a_shard_leaves_no_part_of_it(corpus, tmp_path, monkeypatch):
    original, calls = TarWriter.write, []

    def write(self, sample):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(self, sample)

    monkeypatch.setattr(TarWriter, "write", write)
    with pytest.raises(UsageError, match=r"No space left on device; make room there .* 2 shards are finished"):
        pack([corpus], tmp_path / "out", **SETTINGS)
    monkeypatch.undo()
    pack([corpus], tmp_path / "out", **SETTINGS)
    pack([corpus], tmp_path / "whole", **SETTINGS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_sigkill_half_way(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"document {i} tells of {i * 7} days and {i % 13} nights.\n\n\n" * 20 for i in range(800)))
    code = "import sys; from ltm_pyro.data.pack import pack; pack([sys.argv[1]], sys.argv[2], tokenizer='bpe:400', "
    code += "seq_len=64, shard_rows=100)"
    command = [sys.executable, "-c", code, str(text), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=os.environ | {"RAYON_NUM_THREADS": "1"})
    while process.poll() is None and len(list(tmp_path.glob(".out*.partial/train-*.tar"))) < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("out", "whole"):
        pack([text], tmp_path / name, tokenizer="bpe:400", seq_len=64, shard_rows=100)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
