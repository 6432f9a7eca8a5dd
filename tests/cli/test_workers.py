"""Evaluations and posteriors whose batches several processes share."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch

from ltm_pyro import Scoring, evaluate_run, load_run, score, score_continuations
from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.errors import UsageError

TEXTS = ["cat", "the dog runs", "the bird and the dog and the cat", "a cat sees"] * 3
ALL = ("bound", "iwae", "prior", "causal", "causal_prior", "reused_noise", "shuffled")


@pytest.fixture
def trained(run):
    return load_run(run)


@pytest.mark.parametrize("workers", [0, 10**6])
def test_how_many(trained, workers):
    with pytest.raises(UsageError, match=f"{workers} worker processes"):
        evaluate_run(trained, workers=workers)
    with pytest.raises(UsageError, match=f"{workers} worker processes"):
        draw_posterior(trained, ["cat"], workers=workers)


def test_an_evaluation_is_the_same(trained, monkeypatch):
    monkeypatch.setattr("ltm_pyro.evaluation.evaluate.BATCH", 2)
    alone, shared = (evaluate_run(trained, estimators=ALL, samples=4, workers=n) for n in (1, 3))
    assert alone.sequences > 4
    for name in ALL:
        assert torch.equal(alone.rows.scores[name].nats_B, shared.rows.scores[name].nats_B)
    assert alone.as_dict() == shared.as_dict()


@pytest.mark.parametrize("estimator", ["iwae", "causal"])
def test_scores_are_the_same(trained, estimator):
    alone, shared = (Scoring(estimator=estimator, samples=4, batch_size=2, workers=n) for n in (1, 3))
    assert score(trained, TEXTS, alone) == score(trained, TEXTS, shared)
    pairs = [(text[:4], text[4:8] or " ") for text in TEXTS]
    assert score_continuations(trained, pairs, alone) == score_continuations(trained, pairs, shared)


def test_a_posterior_is_the_same(trained, monkeypatch):
    monkeypatch.setattr(import_module("ltm_pyro.analysis.draw_posterior"), "BATCH", 2)
    options = DrawOptions(samples=25, replicas=1)
    alone, shared = (draw_posterior(trained, TEXTS, options, longer="cut", workers=n) for n in (1, 3))
    for group, data in alone.tree.children.items():
        for name, x in data.data_vars.items():
            y = shared.tree[group][name]
            assert (x.values == y.values).all() if x.dtype == object else np.array_equal(x, y, equal_nan=True), name


def test_the_commands(run, ltm, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    code, shared, _ = ltm("evaluate", run, "--limit", 4, "--samples", 2, "--workers", 2, "--json")
    assert (code, shared) == ltm("evaluate", run, "--limit", 4, "--samples", 2, "--workers", 1, "--json")[:2]
    assert code == 0
    for out in ("a.nc", "b.zarr"):
        asked = ("--input", texts, "--longer", "cut", "--samples", 25, "--out", tmp_path / out)
        stream = ["--stream"] if out == "b.zarr" else []
        assert ltm("posterior", run, *asked, *stream, "--workers", 2)[0] == 0
    asked = ("calibrate", run, "--simulations", 20, "--samples", 9, "--json")
    assert ltm(*asked, "--workers", 2) == ltm(*asked, "--workers", 1)
