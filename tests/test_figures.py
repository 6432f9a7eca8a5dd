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
    old = r"thinking.gain|\b0\.057\b"
    assert not [path.name for path in documents if re.search(old, path.read_text(), re.IGNORECASE)]


def planted(number, bound, seed=0, role="trial", state="complete", reason=None, above=None, **parameters):
    """A study's row with four documents, which have the same bound but for what half of them have more."""
    records = [{"id": n, "file": "", "tokens": 10, "bound_nats": 10 * (bound + 0.1 * (n % 2))} for n in range(4)]
    found = {"bound": bound, "predictive_gain": 0.01} | {f"bound_at_{n}": bound + n for n in (0, 4, 16, 32)}
    row = {"number": number, "role": role, "state": state, "reason": reason, "seed": seed, "parameters": parameters}
    return row | {"figures": found, "records": records, "above_best": above, "above_best_stderr": 0.001}


def test_tables_of_studies_have_the_best_width_both_seeds_and_paired_errors(monkeypatch):
    rows = [
        planted(
            0, width / 10 + (0.5 if thoughts else 0) + seed, flops=5e10, width=width, thoughts=thoughts, steps=steps
        )
        for seed in range(2)
        for width in (1, 2)
        for thoughts, steps in ((0, 0), (4, 2))
    ]
    lead = {"behind": 0.25, "interval": [0.125, 0.375]}
    recommended = {"mean": 5.0, "stderr": 0.0625, "seeds": 3, "leads": [lead | {"behind": 10.5}, lead]}
    monkeypatch.setattr(figures, "study", lambda *_: {"trials": rows, "recommended": recommended})
    monkeypatch.setattr(figures, "report", lambda *_: ["More parameters won."])
    assert figures.scaling(None)[2:] == [
        "| 5·10^10 | autoregressive | 1 | 0.100, 1.100 |  |",
        "| 5·10^10 | K 4, T_fast 2 | 1 | 0.600, 1.600 | +0.500 ± 0.000 |",
        "",
        "- More parameters won.",
    ]
    rows = [planted(0, steps + seed, steps=steps) for seed in range(2) for steps in (0, 2)]
    assert figures.inference_steps(None)[2:] == [
        "| 0, autoregressive | 0.000, 1.000 |  |  |  |  |  |",
        "| 2 | 2.000, 3.000 | +2.000 ± 0.000 | 2.500 | 6.500 | 18.500 | 34.500 |",
    ]
    rows = [
        planted(0, 5.0),
        planted(1, 5.25, above=0.25),
        planted(2, 9.0, state="pruned", reason="pruned after 11% of the budget, bound 9.0000"),
        planted(0, 4.5, role="baseline", above=-0.5),
    ]
    expected = "2 of 3 | 2.1 | 5.000 ± 0.062, 3 seeds | +0.250 (+0.125 to +0.375) | +0.500 ± 0.001 |"
    assert figures.pruning(None)[2:] == [f"| {way} | {expected}" for way in ("without", "with `--prune`")]
