"""Power-scaled posteriors against closed forms, by weights and by fitting q again."""

import numpy as np
import pytest
import torch

from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.sensitivity import ALPHAS, COMPONENTS, power_scaling
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.data.tokenizer import train_tokenizer
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel
from ltm_pyro.runs.run import Run


def closed_form(model, batch, component, alpha):
    """Mean and sd of the posterior: precision a I + b AᵀA / s², with a or b = alpha."""
    prior, likelihood = (alpha if component == name else 1.0 for name in COMPONENTS)
    a, s2 = model.matrix_TN, model.noise**2
    covariance = torch.linalg.inv(prior * torch.eye(a.shape[1]) + likelihood * a.T @ a / s2)
    mean = likelihood * model.observed(batch) @ a @ covariance / s2
    return mean.numpy(), covariance.diagonal().sqrt().numpy()


def flat(x, component, alpha):
    return x.sel(component=component, alpha=alpha).values.reshape(x.sizes["sequence"], -1)


def test_weights_meet_the_closed_form(exact, posterior):
    model = LinearGaussianModel(ThoughtShape(1, 1, 2), length=3, noise=1.0)
    batch = model.sample_batch(5)
    found = power_scaling(posterior(model, exact(model), batch, 8000))
    assert not found.refit.any()
    base, base_sd = closed_form(model, batch, "prior", 1.0)
    for component in COMPONENTS:
        for alpha in ALPHAS:
            mean, sd = closed_form(model, batch, component, alpha)
            np.testing.assert_allclose(flat(found["mean"], component, alpha), mean, atol=0.06)
            np.testing.assert_allclose(flat(found["sd"], component, alpha), np.broadcast_to(sd, mean.shape), rtol=0.1)
            np.testing.assert_allclose(flat(found["shift"], component, alpha), (mean - base) / base_sd, atol=0.1)


@pytest.mark.parametrize("alphas", [(), (0.0,), (-1.0, 2.0), (float("nan"),)])
def test_powers_are_positive(known, exact, posterior, alphas):
    found = posterior(known, exact(known), known.sample_batch(2), 30)
    with pytest.raises(UsageError, match="A power is a finite number above 0"):
        power_scaling(found, alphas=alphas)


@pytest.mark.slow
def test_where_weights_say_nothing_q_is_fitted_again(tiny_run):
    """A model with diagonal A, so that a factorised q is exact; its draws are made too narrow to be reweighted."""
    model = LinearGaussianModel(ThoughtShape(1, 1, 2), length=2, noise=0.3)
    model.matrix_TN = torch.diag(torch.tensor([1.0, 0.5]))
    batch, guide = model.sample_batch(3), MeanField(model)
    inference = LocalInference(steps=800, rate=0.1)
    found = draw_batch_posterior(model, guide, batch, inference, DrawOptions(samples=100))
    found.tree["ltm_pyro/sequences"]["log_q"][:] *= 40  # as if nothing of the posterior were covered
    run = Run(model, guide, train_tokenizer(["a b c"] * 3, 260), inference, "nowhere", 2)
    run = run._replace(model=_with_parameters(model))
    alone, again = power_scaling(found), power_scaling(found, run)
    assert (power_scaling(found, run, alphas=(1.0,))["shift"] == 0).all()
    assert alone.refit.all()
    assert np.isnan(alone["shift"].values).all()
    for component in COMPONENTS:
        for alpha in ALPHAS:
            mean, sd = closed_form(model, batch, component, alpha)
            np.testing.assert_allclose(flat(again["mean"], component, alpha), mean, atol=0.05)
            np.testing.assert_allclose(flat(again["sd"], component, alpha), np.broadcast_to(sd, mean.shape), rtol=0.1)


def _with_parameters(model):
    model.nothing = torch.nn.Parameter(torch.zeros(1))  # a run's device is that of its first parameter
    return model


@pytest.mark.parametrize("power", [{"prior": 3.0}, {"likelihood": 0.25}])
def test_a_power_changes_nothing_but_the_objective(known, power):
    from ltm_pyro.analysis.sensitivity import PowerScaled
    from ltm_pyro.inference.elbo import Draws, elbo_terms

    batch, guide = known.sample_batch(2), MeanField(known)
    local = {"z_loc": torch.zeros(2, 2, 1, 3), "z_log_var": torch.zeros(2, 2, 1, 3)}
    terms = []
    for model in (known, PowerScaled(known, **power)):
        torch.manual_seed(0)
        terms.append(elbo_terms(model, guide, batch, local, Draws(kl="sampled")))
    plain, scaled = terms
    torch.testing.assert_close(scaled.log_likelihood_B, plain.log_likelihood_B * power.get("likelihood", 1.0))
    assert torch.equal(scaled.kl_B, plain.kl_B) == ("prior" not in power)
