import re

import pytest

from ltm_pyro.data.documents import read_documents
from ltm_pyro.errors import UsageError


def test_txt_splits_at_two_or_more_empty_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\n\nstill first\n\n\nsecond\r\n\r\n\r\n\r\nthird\n".encode())
    assert list(read_documents([path])) == [
        ("a.txt:0", "first\n\nstill first", "a.txt"),
        ("a.txt:1", "second", "a.txt"),
        ("a.txt:2", "third\n", "a.txt"),
    ]


def test_jsonl_ignores_other_keys_blank_lines_and_blank_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "x": 1}\n\n{"text": " "}\n{"text": "tw\\u00f6", "source": "web"}', "utf-8")
    assert list(read_documents([str(path)])) == [("a.jsonl:0", "one", "a.jsonl"), ("a.jsonl:1", "twö", "web")]


def test_folder_is_read_recursively_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden.txt", ".git/x.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_documents([tmp_path])) == [("a/c.txt:0", "a/c.txt", "a/c.txt"), ("b.txt:0", "b.txt", "b.txt")]


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
    ("book.pdf", b"x", "{path} has the unknown extension '.pdf'; convert it to .txt or .jsonl."),
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
