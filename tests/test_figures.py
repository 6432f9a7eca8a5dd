"""The tables of figures in the documents: each stands where `make figures` finds it, and none is of an old kind."""

import importlib.util
import re

from tests.usage import ROOT

SPEC = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def test_every_table_stands_in_one_document_and_is_made():
    found = [
        (x.group(2), x.group(0)) for path in figures.documents() for x in figures.MARKED.finditer(path.read_text())
    ]
    assert sorted(name for name, _ in found) == sorted(figures.TABLES)
    assert all("\n| --- |" in text for _, text in found)


def test_no_document_argues_with_a_difference_of_bounds():
    """`prior` less `bound` was called the thinking gain, and was Jensen's gap."""
    documents = [*figures.documents(), *(ROOT / "docs").rglob("*.ipynb")]
    assert not [path.name for path in documents if re.search("thinking.gain", path.read_text(), re.IGNORECASE)]
