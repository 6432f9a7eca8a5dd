"""The quickstart's corpus: text of six kinds that every installation has, always the same."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from ltm_pyro.data import PackedDataset, read_manifest
from ltm_pyro.studies import quickstart
from ltm_pyro.studies.configure import recipe_file
from tests.usage import ROOT


@pytest.fixture(scope="module")
def documents():
    return [*quickstart.corpus()]


def test_it_has_as_many_documents_of_every_kind(documents):
    counts = Counter(x[quickstart.LABEL] for x in documents)
    assert counts == dict.fromkeys(counts, quickstart.OF_EACH)
    assert len(counts) == 6
    assert len({x["id"] for x in documents}) == len(documents)
    assert max(len(x["text"]) for x in documents) <= quickstart.CHARACTERS
    assert all(x["text"].strip() for x in documents)


@pytest.mark.slow
def test_it_is_always_the_same(documents):
    assert documents == [*quickstart.corpus()]


def test_few_lines_cut_into_documents_come_back_in_order():
    text = "".join(f"line {n} of a text that is cut\n" for n in range(200))
    found = [*quickstart._cut(text)]
    assert text.startswith("".join(found))
    assert all(quickstart.CHARACTERS / 2 < len(x) <= quickstart.CHARACTERS for x in found)
    assert [*quickstart._cut("short\n")] == []
    (long, *_) = quickstart._cut("x" * 5000 + "\n" + "y\n" * 900)
    assert len(long) == quickstart.CHARACTERS


def test_it_is_packed_once_with_its_label(documents, tmp_path, monkeypatch, capsys):
    few = [documents[n] for n in range(0, len(documents), 60)]
    monkeypatch.setattr(quickstart, "corpus", lambda: iter(few))
    monkeypatch.setattr("sys.argv", ["quickstart", "--out", str(tmp_path)])
    quickstart.main()
    assert "prose, Python, C++" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "data")
    assert [*manifest.labels] == [quickstart.LABEL]
    kinds = {row.parts[0].document.labels[quickstart.LABEL] for row in PackedDataset.open(tmp_path / "data", "train")}
    assert len(kinds) == 6
    before = (tmp_path / "corpus.jsonl").stat().st_mtime_ns
    quickstart.main()
    assert (tmp_path / "corpus.jsonl").stat().st_mtime_ns == before


def test_the_makefile_measures_the_context_by_its_recipe():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"--label {quickstart.LABEL} " in makefile
    recipe = yaml.safe_load(Path(recipe_file("quickstart.yaml")).read_text("utf-8"))
    assert recipe["data"]["directory"] == "runs/quickstart/data"
