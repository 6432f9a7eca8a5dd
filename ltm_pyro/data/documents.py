"""Documents from files, folders of them and Hugging Face data sets, read as a stream."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ltm_pyro.data.formats import EXTENSIONS, Text, read_hub, read_texts
from ltm_pyro.errors import UsageError

HUB = "hf:"


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is ``"file:index"``, the index counted from 0 within the file; ``source`` is the record's value of
    ``"source"``, else the file's name.
    """

    id: str
    text: str
    source: str


def read_documents(inputs: Iterable[str | Path]) -> Iterator[Document]:
    """Every document of ``inputs``, in order; a folder is searched recursively, sorted by name.

    An input is a file (`EXTENSIONS`), a folder of them, or ``hf:NAME[:CONFIG]``. A `.txt` file is split into documents
    at runs of two or more empty lines, and at the end of a line if one would be longer than 4 million characters.
    `.jsonl` has one object per line, with the text under ``"text"`` and optionally a label under ``"source"``; the
    columns of Parquet and of data sets have the same names. Other keys are ignored, and documents of white space only
    are dropped. In a folder, hidden files and files of other kinds are skipped. Raises `UsageError` for input that
    cannot be read in its format.
    """
    for given in inputs:
        for origin, name, texts in _origins(given):
            index = -1
            for index, (text, source) in enumerate(found for found in texts if found[0].strip()):
                yield Document(f"{name}:{index}", text, source or name)
            if index < 0:
                raise UsageError(f"{origin} holds no documents; remove it from the input or give it some text.")


def input_files(given: str | Path) -> list[tuple[Path, str]]:
    """The files of one input, each with its name in document ids; a data set has none."""
    path = Path(given)
    if str(given).startswith(HUB):
        return []
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a .txt, .jsonl or .parquet file or a folder of them.")
    if not path.is_dir():
        if not path.name.endswith(EXTENSIONS):
            raise UsageError(f"{path} has the unknown extension {path.suffix!r}; convert it to .txt or .jsonl.")
        return [(path, path.name)]
    found = [file for file in sorted(path.rglob("*")) if file.name.endswith(EXTENSIONS) and file.is_file()]
    visible = [(file, file.relative_to(path)) for file in found]
    visible = [(file, name) for file, name in visible if not any(part.startswith(".") for part in name.parts)]
    if not visible:
        raise UsageError(f"folder {path} holds no .txt, .jsonl or .parquet files; give a folder that does.")
    return [(file, name.as_posix()) for file, name in visible]


def _origins(given: str | Path) -> Iterator[tuple[str, str, Iterator[Text]]]:
    """Every file or data set of an input: its place, its name in document ids, and its texts."""
    if str(given).startswith(HUB):
        name = str(given).removeprefix(HUB)
        yield str(given), name, read_hub(name)
    yield from ((str(file), name, read_texts(file)) for file, name in input_files(given))
