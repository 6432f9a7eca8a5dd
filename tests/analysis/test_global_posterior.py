"""Global latent variables in the analysis: their posterior is the log-normal that training has left."""

import numpy as np
import pytest
import torch

from ltm_pyro.analysis.global_posterior import global_posteriors
from ltm_pyro.analysis.section import ReportInputs
from ltm_pyro.analysis.sections_of_findings import global_latents
from ltm_pyro.errors import UsageError
from ltm_pyro.models import SparsePrior


def test_draws_and_shrinkage_are_those_of_the_log_normal(tiny_run, known, exact, posterior):
    run, of_texts = tiny_run(), posterior(known, exact(known), known.sample_batch(2), 25)
    run.model.prior = SparsePrior(run.model.decoder.thought_shape, tau=0.1)
    scale = run.model.prior.scale
    with torch.no_grad():
        scale.loc.copy_(torch.linspace(-2, 1, scale.loc.numel()).view_as(scale.loc))
        scale.log_scale.fill_(-1.0)
    (found,) = global_posteriors(run.model, draws=8000)
    np.testing.assert_allclose(np.log(found.interval_3N[1]), scale.loc.detach().flatten(), atol=0.03)
    width = np.log(found.interval_3N[2]) - np.log(found.interval_3N[0])
    np.testing.assert_allclose(width, 2 * 1.645 * np.exp(-1.0), rtol=0.06)
    # log g of a half-Cauchy: its 15.87 % and 84.13 % quantiles are log(tau tan(pi p / 2))
    wide = np.diff(np.log(np.tan(np.pi * np.array([0.1587, 0.8413]) / 2)))[0] / 2
    np.testing.assert_allclose(found.shrinkage_N, 1 - np.exp(-1.0) / wide, atol=0.03)
    assert found.kl == pytest.approx(scale.kl(2000).item(), rel=0.1)
    assert "'z_scale'" in global_latents(ReportInputs(of_texts, run=run)).verdict


def test_a_prior_without_any(tiny_run):
    with pytest.raises(UsageError, match="no global latent variables"):
        global_posteriors(tiny_run().model)
