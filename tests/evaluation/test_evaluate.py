"""Evaluations leave the run as it was, and take rows of like length together."""

import copy
import json
import sys

import pytest
import torch

from ltm_pyro.data import load_text_or_pack
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import batches_of, evaluate_run, with_estimated_normaliser
from ltm_pyro.evaluation.suites.features import run_extractor
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.local import infer_local
from ltm_pyro.models import EnergyPrior
from ltm_pyro.utils.rng import seeded

OPTIONS = {"estimators": ["bound", "iwae", "prior"], "samples": 3, "fast_steps": 2}


@pytest.fixture
def energy_run(tiny_run):
    run = tiny_run()
    run.model.prior = EnergyPrior(run.model.decoder.thought_shape, width=8, steps=2)
    torch.nn.init.normal_(run.model.prior.tilt[-1].weight, std=0.3)
    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(["the old model reads a long text about time."] * 3))
    return str(path)


def test_an_evaluation_leaves_the_run_without_a_normaliser(energy_run, text, capsys):
    """Its figures are those of a model that was given the same estimate in place."""
    weights = copy.deepcopy(energy_run.model.state_dict())
    before = evaluate_run(energy_run, text, **OPTIONS)
    found = evaluate_run(energy_run, text, normaliser=500, **OPTIONS)
    assert "log normaliser of EnergyPrior: " in capsys.readouterr().err
    assert energy_run.model.prior.log_normaliser.isnan()
    assert evaluate_run(energy_run, text, **OPTIONS) == before
    assert {"bound", "iwae"} == set(before.unavailable)
    for name, weight in energy_run.model.state_dict().items():
        assert torch.equal(weight, weights[name])

    in_place = copy.deepcopy(energy_run)
    with seeded(0):
        in_place.model.prior.estimate_normaliser(500)
    assert found == evaluate_run(in_place, text, **OPTIONS)
    assert not found.unavailable
    assert not any(score.is_bound for score in found.estimates.values())


def test_the_copy_shares_the_decoder_and_nothing_of_the_prior(energy_run):
    model = with_estimated_normaliser(energy_run.model, 100)
    assert model.decoder is energy_run.model.decoder
    assert not {id(p) for p in model.prior.parameters()} & {id(p) for p in energy_run.model.prior.parameters()}
    assert model.prior.log_normaliser.isfinite()
    assert model.prior.log_normaliser != with_estimated_normaliser(energy_run.model, 100, seed=1).prior.log_normaliser


def test_a_normalised_prior_has_nothing_to_estimate(tiny_run, text):
    with pytest.raises(UsageError, match="leave --normaliser out"):
        evaluate_run(tiny_run(), text, normaliser=100, **OPTIONS)


@pytest.fixture
def uneven(tmp_path):
    """Documents of one, of few and of many words, in no order of length."""
    words = ["the", "old", "model", "reads", "a", "long", "text", "about", "time"]
    path = tmp_path / "uneven.jsonl"
    texts = [" ".join((words * 3)[: 1 + (7 * i) % 11]) for i in range(30)]
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def test_rows_of_like_length_are_taken_together_and_come_back_in_order(tiny_run, uneven, monkeypatch):
    """The figures of every row are those of the rows in the order of the data, at fewer tokens of padding."""
    run, module = tiny_run(), sys.modules["ltm_pyro.evaluation.evaluate"]
    data = load_text_or_pack(uneven, run.tokenizer, run.length)
    names, padding = ["bound", "iwae", "causal", "causal_prior"], []

    def watched(batches):
        for batch in batches:
            padding.append(int((~batch.mask_BT).sum()))
            yield batch

    rows = [*data]
    batches = watched(data.collate(rows[i : i + 4]) for i in range(0, len(rows), 4))
    expected = evaluate(run.model, run.guide, batches, run.inference, names, samples=3, block=4)
    before = sum(padding)
    padding.clear()
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "WINDOW", 20)
    monkeypatch.setattr(module, "batches_of", lambda *a: watched(batches_of(*a)))
    found = evaluate_run(run, uneven, names, samples=3, block=4)
    assert found.rows.ids_B.tolist() == expected.rows.ids_B.tolist() == [*range(len(rows))]
    assert [x[0].document.id for x in found.rows.parts] == [x[0].document.id for x in expected.rows.parts]
    for name in names:
        torch.testing.assert_close(found.rows.scores[name].nats_B, expected.rows.scores[name].nats_B, rtol=0, atol=1e-8)
        assert found.estimates[name].nats_per_token == pytest.approx(expected.estimates[name].nats_per_token)
    torch.testing.assert_close(
        found.rows.predictive_gain_B, expected.rows.predictive_gain_B, rtol=0, atol=1e-8, equal_nan=True
    )
    assert sum(padding) < before / 2


def test_texts_that_come_again_are_not_fitted_again(tiny_run, monkeypatch):
    run, fitted = tiny_run(), []

    def watched(model, guide, batch, *rest, **options):
        fitted.append(batch.size)
        return infer_local(model, guide, batch, *rest, **options)

    monkeypatch.setattr(sys.modules["ltm_pyro.evaluation.suites.features"], "infer_local", watched)
    extract = run_extractor(run)
    texts = ["the old", "a long text and short words", "model"]
    first = extract(texts, 0)
    again = extract([*texts[::-1], "reads", texts[0]], 0)
    assert sum(fitted) == 4
    assert (again[[2, 1, 0]] == first).all()
    assert (again[4] == first[0]).all()
    assert not (extract(texts, 1) == first).all()
