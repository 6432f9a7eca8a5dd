"""The corpus of the quickstart: text of six kinds, prose and five languages of programs and data.

It is read where Python and the packages have put it, so that nothing is downloaded. A decoder that sees seven tokens
cannot know the kind of its text; `ltm context` measures how much of what full attention sees passes through z.
"""

import argparse
import json
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.data import pack

LABEL = "kind"  # of the documents, which no model is told
OF_EACH, CHARACTERS = 700, 300  # documents of a kind, and the most characters of one: about a sequence
PACKAGES = ("torch", "scipy")
FILES = {  # of each kind, below the folder of installed packages
    "C++": ["torch/include/**/*.h"],
    "Cython": ["scipy/**/*.pyx", "scipy/**/*.pxd"],
    "CMake": ["torch/**/*.cmake"],
    "YAML": ["torchgen/**/*.yaml"],
}
KINDS = ("prose", "Python", *FILES)


def sources() -> dict[str, list[str]]:
    """The texts of every kind, in an order that the versions of Python and of the packages decide."""
    from pydoc_data.topics import topics

    packages = Path(torch.__file__).parents[1]
    files = {"Python": [*Path(sysconfig.get_path("stdlib")).glob("*.py")]}
    files |= {kind: [path for x in patterns for path in packages.glob(x)] for kind, patterns in FILES.items()}
    texts = {kind: [path.read_text("utf-8", "replace") for path in sorted(paths)] for kind, paths in files.items()}
    return {"prose": [text for _, text in sorted(topics.items())], **texts}


def corpus() -> Iterator[dict[str, str]]:
    """Documents of every kind, mixed: whole lines of a text, of which some are drawn, always the same ones."""
    rows = []
    for kind, texts in sources().items():
        documents = [document for text in texts for document in _cut(text)]
        random.Random(kind).shuffle(documents)
        rows += [{"id": f"{kind} {n}", LABEL: kind, "text": text} for n, text in enumerate(documents[:OF_EACH])]
    random.Random(0).shuffle(rows)
    yield from rows


def _cut(text: str) -> Iterator[str]:
    """Documents of up to `CHARACTERS` characters; what remains at the end of a text is left out."""
    document = ""
    for line in text.splitlines(keepends=True):
        if len(document) + len(line) > CHARACTERS:
            if len(document) > CHARACTERS / 2:
                yield document
            document = ""
        document += line[:CHARACTERS]


def pack_once(out: Path, rows: Iterable[dict[str, str]], **settings: Any) -> Path:
    """Packs the rows, unless they are packed already and need not be made; returns the packed directory."""
    packed = out / "data"
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        pack([str(out / "corpus.jsonl")], packed, **settings)
    return packed


def main() -> None:
    """Packs the corpus; `ltm context` does the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where it goes")
    alike = {"keep_together": "exact"}  # programs are much alike: whole kinds would fall on one side
    sizes = {"tokenizer": "bpe:300", "seq_len": 256, "val_fraction": 0.06}
    packed = pack_once(parser.parse_args().out, corpus(), labels=[LABEL], **sizes, **alike)
    parts = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    print(f"Packed in {packed}: {OF_EACH} documents each of {', '.join(KINDS)}, from {parts}.")


if __name__ == "__main__":
    main()
