"""What `ltm compare` keeps of each document is JSON, also where a figure is not finite."""

import json
import math

import pytest

from ltm_pyro.evaluation.documents import RECORDS
from ltm_pyro.studies import compare as study


def test_documents_without_a_finite_figure_are_written_and_left_out(monkeypatch, tmp_path):
    """They have None, since JSON knows no infinity, and a difference is over the documents that both have scored."""
    records = [{"id": n, "file": "x", "tokens": 2, "bytes": 2, "bound_nats": nats} for n, nats in enumerate((4.0, 6.0))]
    broken = {"id": 2, "file": "x", "tokens": 2, "bytes": 2, "bound_nats": math.inf}
    for name in ("train", "load_run"):
        monkeypatch.setattr(study, name, lambda _: None)
    monkeypatch.setattr(study, "_pace", lambda _: {})
    monkeypatch.setattr(study.Comparison, "_configure", lambda *_: None)
    monkeypatch.setattr(study.Comparison, "_score", lambda *_: ({"bound": math.inf}, [*records, broken]))
    made = study.Comparison(
        config="", priors=["GaussianPrior"], guides=["MeanField"], budget=study.Budget(60.0, "s"), out=tmp_path
    )
    for pair in made.pairs:
        (tmp_path / pair.name).mkdir()
        assert made.figures(pair)["bound"] is None
        text = (tmp_path / pair.name / RECORDS).read_text("utf-8")
        assert json.loads(text, parse_constant=pytest.fail)[2]["bound_nats"] is None
    with pytest.warns(UserWarning, match="^1 of 3 documents"):
        assert made.difference(made.pairs[1])["difference"] == 0
