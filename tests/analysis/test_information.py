"""Information in the thoughts: the decomposition agrees with closed forms, two-sample tests with known cases."""

import math

import numpy as np
import pytest
import torch

from ltm_pyro.analysis.classifiers import c2st
from ltm_pyro.analysis.draw_posterior import draw_batch_posterior
from ltm_pyro.analysis.information import active_units, aggregate, decompose
from ltm_pyro.analysis.two_sample import mmd
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FlowGuide, FullCovariance, LowRank, MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import GaussianPrior, HierarchicalPrior, LinearGaussianModel


def test_mutual_information_and_marginal_kl_sum_to_the_average_kl(known, posterior):
    batch = known.sample_batch(60)
    guide = MeanField(known)
    found = posterior(known, guide, batch, 200, LocalInference(steps=60, rate=0.1))
    parts = decompose(known, guide, found)
    assert parts.mutual_information + parts.marginal_kl == pytest.approx(parts.average_kl, abs=1e-9)
    exact_kl = float(found.stats.kl_by_thought.sum(("layer", "thought")).mean())
    noise = float((found.stats.log_q - found.stats.log_prior).std("draw").mean()) / (16 * 60) ** 0.5
    assert abs(parts.average_kl - exact_kl) < 4 * noise
    assert 0 < parts.mutual_information < parts.most == pytest.approx(math.log(60))


def test_the_exact_posterior_of_the_models_own_texts_aggregates_to_the_prior(known, exact, posterior):
    """Averaged over p(x) the posterior is the prior: no marginal KL, and no difference for a two-sample test."""
    loud = LinearGaussianModel(known.prior.shape, length=2, noise=1.0)
    guide, batch = exact(loud), loud.sample_batch(200)
    found = posterior(loud, guide, batch, 200)
    parts = decompose(loud, guide, found)
    matrix = loud.matrix_TN
    channel = torch.eye(2) + matrix @ matrix.T  # Gaussian channel: I(x; z) = ½ log det(I + A Aᵀ / s²)
    assert parts.mutual_information == pytest.approx(torch.logdet(channel).item() / 2, abs=0.1)
    assert abs(parts.marginal_kl) < 0.1
    both = aggregate(found)
    assert abs(both.c2st.mean - 0.5) < 3 * both.c2st.stderr
    assert both.mmd.p_value > 0.01


def test_a_posterior_that_ignores_the_text_is_seen(known, exact, posterior):
    found = posterior(known, exact(known, scale=0.3), known.sample_batch(100), 100)
    both = aggregate(found)
    assert both.c2st.mean > 0.5 + 3 * both.c2st.stderr
    assert both.mmd.p_value <= 0.01  # the smallest p-value with 99 permutations


def test_active_units_count_the_coordinates_that_the_data_move(exact, posterior):
    model = LinearGaussianModel(ThoughtShape(2, 1, 3), length=6, noise=0.3)
    model.matrix_TN[:, [0, 4]] = 0  # what no observation depends on
    found = posterior(model, exact(model), model.sample_batch(50), 400)
    assert active_units(found).values.tolist() == [[2], [2]]


@pytest.mark.parametrize("guide", [MeanField, FullCovariance, LowRank, FlowGuide])
@pytest.mark.parametrize("prior", [GaussianPrior, HierarchicalPrior])
def test_chance_is_neither_an_active_unit_nor_kl(prior, guide):
    """Nothing is observed, so that q, which starts at the prior, is the posterior; moments may be from 100 draws."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 8), noise=1e4)
    batch, model.prior = model.sample_batch(64), prior(model.prior.shape)
    found = draw_batch_posterior(model, guide(model), batch, LocalInference(steps=0))
    assert active_units(found).sum() <= (0 if prior is GaussianPrior and guide is not FlowGuide else 1)
    assert abs(found.stats.kl_by_thought.sum(("layer", "thought")).mean()) < 0.02


@pytest.mark.parametrize(("shift", "scale", "low", "high"), [(0, 1, 0.46, 0.54), (3, 1, 0.9, 1), (0, 3, 0.8, 1)])
def test_a_classifier_tells_apart_what_differs(shift, scale, low, high):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(500, 4)), shift + scale * random.normal(size=(500, 4))
    assert low <= c2st(a, b).mean <= high


@pytest.mark.parametrize("scale", [0.1, 1e-3, 1e-6])
def test_a_classifier_tells_what_is_far_too_narrow(scale):
    a, b = np.random.default_rng(0).normal(size=(2, 100, 4))
    assert c2st(scale * a, b).mean > 0.95


def test_draws_that_do_not_vary_are_refused():
    with pytest.raises(UsageError, match="The 100 draws of one set do not vary"):
        c2st(np.zeros((100, 4)), np.random.default_rng(0).normal(size=(100, 4)))


def test_a_classifier_sees_correlation_alone():
    random = np.random.default_rng(0)
    b = random.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 1000)
    expected = 0.5 + 0.515 / 2  # ½ + TV / 2 of the two Gaussians, by quadrature
    assert c2st(random.normal(size=(1000, 2)), b).mean == pytest.approx(expected, abs=0.04)


def test_mmd_meets_its_closed_form_and_its_p_value_is_uniform_under_equality():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(400, 1)), 2 + random.normal(size=(400, 1))
    pooled = np.concatenate([a, b])
    width = np.median((pooled - pooled.T)[~np.eye(800, dtype=bool)] ** 2)  # k = exp(-d² / width)
    same, other = (1 + 4 / width) ** -0.5, (1 + 4 / width) ** -0.5 * math.exp(-4 / (width + 4))
    assert mmd(a, b).mmd2 == pytest.approx(2 * (same - other), rel=0.15)
    p_values = [mmd(*random.normal(size=(2, 20, 2))).p_value for _ in range(40)]
    assert abs(np.mean(p_values) - 0.5) < 3 * 0.29 / 40**0.5


def test_too_few_sequences(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(3))
    with pytest.raises(UsageError, match="at least 20 sequences, got 3"):
        aggregate(found)
    with pytest.raises(UsageError, match="at least 2 sequences, got 1"):
        decompose(known, exact(known), found.select(0))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [(60, 3), (200, 8)])
def test_equal_distributions_are_rejected_as_often_as_the_level_says(size, width):
    random = np.random.default_rng(0)
    p = [c2st(*random.normal(size=(2, size, width)), seed=n).p_value for n in range(400)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.075  # the number of right answers is whole, so that 0.05 is not met
