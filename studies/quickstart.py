"""The corpus of the quickstart: text of six kinds, prose and five languages of programs and data.

It is read where Python and the packages have put it, so that nothing is downloaded. A decoder that sees seven tokens
cannot know the kind of its text; `ltm context` measures how much of what full attention sees passes through z.
"""

import argparse
import json
import platform
import random
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.data import pack

LABEL = "kind"  # of the documents, which no model is told
OF_EACH, CHARACTERS = 700, 300  # documents of a kind, and the most characters of one: about a sequence
PACKAGES = ("torch", "scipy")


def sources() -> dict[str, list[str]]:
    """The texts of every kind, in an order that the versions of Python and of the packages decide."""
    from pydoc_data.topics import topics

    library, packages = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parents[1]
    files = {
        "Python": library.glob("*.py"),
        "C++": (packages / "torch" / "include").rglob("*.h"),
        "Cython": (path for ending in ("pyx", "pxd") for path in (packages / "scipy").rglob(f"*.{ending}")),
        "CMake": (packages / "torch").rglob("*.cmake"),
        "YAML": (packages / "torchgen").rglob("*.yaml"),
    }
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


def prepare(out: Path) -> Path:
    """Extracts and packs the corpus once; returns the packed directory."""
    packed = out / "data"
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in corpus())
        settings: dict[str, Any] = {"tokenizer": "bpe:300", "seq_len": 256, "labels": [LABEL], "val_fraction": 0.06}
        settings["keep_together"] = "exact"  # programs are much alike: whole kinds would fall on one side
        pack([str(out / "corpus.jsonl")], packed, **settings)
    return packed


def main() -> None:
    """Packs the corpus; `ltm context` does the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where it goes")
    packed = prepare(parser.parse_args().out)
    parts = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    print(f"Packed in {packed}: {OF_EACH} documents each of {', '.join(sources())}, from {parts}.")


if __name__ == "__main__":
    main()
