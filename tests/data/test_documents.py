import gzip
import json
import re

import pytest

from ltm_pyro.data.documents import Fields, left_out, read_documents
from ltm_pyro.errors import UsageError


def test_txt_splits_at_two_or_more_empty_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\n\nstill first\n\n\nsecond\r\n\r\n\r\n\r\nthird\n".encode())
    assert [found[:3] for found in read_documents([path])] == [
        ("a.txt:1", "first\n\nstill first", "a.txt"),
        ("a.txt:6", "second", "a.txt"),
        ("a.txt:10", "third", "a.txt"),
    ]


def test_jsonl_ignores_other_keys_blank_lines_and_blank_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "x": 1}\n\n{"text": " "}\n{"text": "tw\\u00f6", "source": "web"}', "utf-8")
    found = [document[:3] for document in read_documents([str(path)])]
    assert found == [("a.jsonl:1", "one", "a.jsonl"), ("a.jsonl:4", "twö", "web")]


def test_folder_is_read_recursively_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden.txt", ".git/x.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in read_documents([tmp_path])] == ["a/c.txt:1", "b.txt:1"]
    assert left_out(tmp_path) == ["README.md"]


def test_files_are_known_by_their_content_where_the_name_does_not_say_it(tmp_path):
    line = b'{"text": "a line"}\n'
    folder = tmp_path / "folder"
    (folder / "far").mkdir(parents=True)
    (folder / "c4.json.gz").write_bytes(gzip.compress(line))
    (folder / "far/plain").write_bytes(line * 2)
    (folder / "list.json").write_bytes(b'[{"text": "a line"}]')
    (folder / "picture").write_bytes(bytes(range(256)))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/b.txt").write_text("text")
    (folder / "link").symlink_to(tmp_path / "linked")
    (folder / "round").symlink_to(folder)
    found = [document.id for document in read_documents([folder])]
    assert found == ["c4.json.gz:1", "far/plain:1", "far/plain:2", "link/b.txt:1"]
    assert left_out(folder) == ["list.json", "picture"]
    (tmp_path / "notes.md").write_text("# Notes")
    assert [document.text for document in read_documents([tmp_path / "notes.md"])] == ["# Notes"]
    with pytest.raises(UsageError, match=r"list.json is neither text nor JSON lines nor Parquet; convert it"):
        [*read_documents([folder / "list.json"])]


def test_prompts_labels_and_ids_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        {"prompt": "one ", "completion": "two", "year": 1, "key": "x", "more": [1]},
        {"text": "three", "year": "1", "key": 7},
    ]
    path.write_text("\n\n".join(map(json.dumps, records)))
    first, second = read_documents([path], Fields("key", ("year", "source")))
    assert (first.id, first.text, first.prompt, first.labels) == ("x", "one two", 4, {"year": 1, "source": None})
    assert (second.id, second.text, second.prompt, second.labels) == (7, "three", None, {"year": "1", "source": None})
    assert [document.labels for document in read_documents([path], Fields(labels=None))] == [
        {"year": 1, "key": "x"},
        {"year": "1", "key": 7},
    ]
    with pytest.raises(UsageError, match=r"a.jsonl line 1 has under 'more' \[1\], which is no label"):
        [*read_documents([path], Fields(labels=("more",)))]
    with pytest.raises(UsageError, match=r"line 1 has no string or whole number under 'id', which was named as the id"):
        [*read_documents([path], Fields("id"))]


BAD = [
    ("empty.txt", b"", "{path} holds no documents; remove it from the input or give it some text."),
    ("blank.jsonl", b'{"text": "\\n"}\n', "{path} holds no documents; remove it from the input or give it some text."),
    ("nul.txt", b"ab\0c", "{path} looks binary (NUL byte at offset 2); give text encoded as UTF-8."),
    ("latin.txt", b"caf\xe9 ", "{path} is not UTF-8 (byte 0xe9 at offset 3); re-encode it."),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "{path} is not UTF-8 (byte 0xff at offset 24); re-encode it."),
    ("cut.jsonl", b'{"text": "a"}\n{"text": ', "{path} line 2 is not valid JSON"),
    ("key.jsonl", b'{"body": "a"}\n', '{path} line 1 has no string under the key "text"; name the text of each'),
    ("list.jsonl", b'["a"]\n', '{path} line 1 has no string under the key "text"; name the text of each'),
    ("number.jsonl", b'{"text": 1}\n', '{path} line 1 has no string under the key "text"; name the text of each'),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "{path} line 1 holds half of a surrogate pair"),
    ("book.pdf", b"%PDF\xff\x00", "{path} is neither text nor JSON lines nor Parquet; convert it to .txt or .jsonl."),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message.format(path=path))) as caught:
        list(read_documents([path]))
    assert "\n" not in str(caught.value)


def test_missing_input_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'no'} does not exist; give a .txt")):
        list(read_documents([tmp_path / "no"]))
    with pytest.raises(UsageError, match=re.escape(f"folder {tmp_path} holds no .txt, .jsonl or .parquet files")):
        list(read_documents([tmp_path]))


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")
    monkeypatch.setattr(type(path), "open", _denied)
    with pytest.raises(UsageError, match=re.escape(f"cannot read {path}: Permission denied; check the path")):
        list(read_documents([path]))


def _denied(*_):
    raise PermissionError(13, "Permission denied")
