"""An estimated normaliser belongs to one evaluation, not to the caller's run."""

import copy

import pytest
import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import evaluate_run, with_estimated_normaliser
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
