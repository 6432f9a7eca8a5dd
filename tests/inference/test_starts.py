"""Where q starts: the prior's own moments for any support, and several starts where the prior has several modes."""

import math
import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.distributions import biject_to

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FullCovariance, Langevin, MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.latent_sites import prior_moments
from ltm_pyro.inference.local import infer_local, init, number_of_starts, passes_of_fit, training_loss
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.starts import SEVERAL, component_at, has_several_modes
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import AutoregressivePrior, LinearGaussianModel, MixturePrior
from ltm_pyro.models.density import ThoughtDensity

SHAPE = ThoughtShape(2, 1, 2)
T = torch.tensor
FAIR = dist.Categorical(torch.ones(2))
EXACT = {  # families whose mean and variance in unconstrained coordinates have a closed form
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "Student": lambda: dist.StudentT(5.0, 1.0, 0.5),
    "Gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "Beta": lambda: dist.Beta(0.5, 2.0),
    "LogNormal": lambda: dist.LogNormal(1.0, 0.5),
    "Dirichlet": lambda: dist.Dirichlet(T([0.5, 1.0, 3.0])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(T([1.0, -1.0]), torch.eye(2) * 2),
    "mixture": lambda: dist.MixtureSameFamily(FAIR, dist.Normal(T([-3.0, 3.0]), 1.0)),
    "mixture of Betas": lambda: dist.MixtureSameFamily(FAIR, dist.Beta(T([3.0, 1.0]), T([1.0, 1.0]))),
    "mixture of simplexes": lambda: dist.MixtureSameFamily(FAIR, dist.Dirichlet(T([[3.0, 1, 1], [1, 1, 4.0]]))),
}
BY_QUANTILES = {  # those whose moments do not exist, or are not known
    "Cauchy": lambda: dist.Cauchy(1.0, 2.0),
    "Student with infinite variance": lambda: dist.StudentT(1.5, 2.0, 3.0),
    "HalfCauchy": lambda: dist.HalfCauchy(T(0.3)),
    "HalfNormal": lambda: dist.HalfNormal(T(2.0)),
    "Exponential": lambda: dist.Exponential(T(2.0)),
    "Uniform": lambda: dist.Uniform(T(-1.0), T(3.0)),
    "Pareto": lambda: dist.Pareto(T(1.0), T(2.0)),
    "Weibull": lambda: dist.Weibull(T(1.0), T(2.0)),
    "Kumaraswamy": lambda: dist.Kumaraswamy(T(1.5), T(2.0)),
}


def coordinates(fn, draws=200_000):
    """Samples in unconstrained coordinates."""
    support = fn.support
    return biject_to(getattr(support, "base_constraint", support)).inv(fn.sample((draws,)))


@pytest.mark.parametrize("name", EXACT)
def test_q_starts_at_the_moments_of_the_prior(name):
    fn = EXACT[name]().expand_by([3])
    mean, variance = prior_moments(fn)
    x = coordinates(fn)
    assert mean.shape == variance.shape == x.shape[1:]
    assert ((x.mean(0) - mean).abs() < 5 * variance.sqrt() / math.sqrt(len(x))).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", BY_QUANTILES)
def test_q_starts_at_median_and_quantiles_where_there_are_no_moments(name):
    fn = BY_QUANTILES[name]().expand_by([3])
    mean, variance = prior_moments(fn.to_event(1))
    x = coordinates(fn)
    assert mean.shape == variance.shape == (3,)
    spread = x.quantile(0.8413, dim=0) - x.quantile(0.1587, dim=0)
    assert ((x.quantile(0.5, dim=0) - mean).abs() < 0.02 * spread).all()
    tolerance = 0.5 if "Student" in name else 0.03  # of which its scale is taken
    torch.testing.assert_close(spread / 2, variance.sqrt(), rtol=tolerance, atol=0)


def prior_of(forward):
    """A prior of the user's own."""

    class Own(PyroModule):
        def forward(self):
            return forward()

    return Own()


def horseshoe():
    scale = pyro.sample("scale", dist.HalfCauchy(torch.full(SHAPE, 0.5)).to_event(3))
    return pyro.sample("z", dist.Normal(0.0, scale).to_event(3))


def model_of(prior, noise=0.3):
    model = LinearGaussianModel(SHAPE, length=6, noise=noise)
    model.prior = prior
    return model


def far_mixture(components=4):
    """Clusters ten standard deviations apart."""
    prior = MixturePrior(SHAPE, components, spread=4.0)
    with torch.no_grad():
        prior.log_scale_MLKD.normal_(-1, 0.2)
        prior.logits_M.normal_()
    return prior


def log_evidence_B(model, batch):
    """log Σ_m π_m N(y; A m_m, A S_m Aᵀ + s² I): a mixture seen through a matrix."""
    prior, matrix_TN = model.prior, model.matrix_TN
    mean_MT = prior.mean_MLKD.flatten(1) @ matrix_TN.T
    variance_MN = (2 * prior.log_scale_MLKD).exp().flatten(1)
    covariance_MTT = (matrix_TN * variance_MN[:, None]) @ matrix_TN.T + model.noise**2 * torch.eye(len(matrix_TN))
    log_p_BM = torch.distributions.MultivariateNormal(mean_MT, covariance_MTT).log_prob(model.observed(batch)[:, None])
    return (log_p_BM + prior.logits_M.log_softmax(0)).logsumexp(-1)


def elbo_B(model, guide, batch, state, draws=64):
    """The ELBO at draws that no fit has seen."""
    with torch.no_grad():
        return elbo_terms(model, guide, batch, state.parameters, Draws(draws)).elbo_B.mean(0)


def test_a_site_below_one_without_a_mean_has_the_same_start_under_every_random_seed():
    model = model_of(prior_of(horseshoe))
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(init(model, MeanField(model), model.sample_batch(2), LocalInference()).parameters)
    torch.testing.assert_close(*starts)
    torch.testing.assert_close(starts[0]["z_log_var"], torch.full((2, *SHAPE), 0.25).log())  # the median scale, 0.5


def test_several_starts_find_the_cluster_that_one_start_misses():
    """The evidence of far clusters is known, and so is what q loses: the log-probability of the cluster it is in."""
    model = model_of(far_mixture())
    batch, guide = model.sample_batch(8), FullCovariance(model)
    inference = LocalInference(steps=100, rate=0.1, particles=4)
    found = {}
    with torch.no_grad():
        evidence_B = log_evidence_B(model, batch)
    for starts in (1, None):
        keys = RowKeys.of_batch(batch, 0)
        state, info = infer_local(model, guide, batch, replace(inference, starts=starts), keys=keys)
        assert info.elbo_NB.shape == (100, 8)
        assert (state.keys.key_B == keys.key_B).all()
        found[starts] = (evidence_B - elbo_B(model, guide, batch, state)).detach()
    assert found[None].max() < 0.3
    assert found[1].max() > 3


def test_the_best_start_is_that_of_the_sequence_and_not_of_its_batch():
    model = model_of(far_mixture())
    batch, guide, inference = model.sample_batch(3), MeanField(model), LocalInference(steps=5, rate=0.1, starts=3)
    whole, _ = infer_local(model, guide, batch, inference, keys=RowKeys.of_batch(batch, 7))
    for row in range(3):
        one = batch.select(torch.tensor([row]))
        alone, _ = infer_local(model, guide, one, inference, keys=RowKeys.of_batch(one, 7))
        for name, x in alone.parameters.items():
            torch.testing.assert_close(x[0], whole.parameters[name][row])


def test_more_starts_are_never_worse_at_the_draws_that_choose():
    """The first start is one of the several, and they are compared at common draws."""
    model = model_of(far_mixture())
    batch, guide = model.sample_batch(6), MeanField(model)
    keys, chosen = RowKeys.of_batch(batch, 1), []
    for starts in (1, 4):
        inference = LocalInference(steps=20, rate=0.1, starts=starts)
        state, _ = infer_local(model, guide, batch, inference, keys=keys)
        with torch.no_grad():
            noise = [RowNoise(keys.fold_in("best start"), draw) for draw in range(16)]
            terms = [elbo_terms(model, guide, batch, state.parameters, Draws(noise=x)) for x in noise]
        chosen.append(sum(x.elbo_B for x in terms))
    assert (chosen[1] >= chosen[0] - 1e-9).all()
    assert (chosen[1] > chosen[0] + 1).any()


def test_a_training_step_starts_at_the_best_of_its_starts():
    model = model_of(far_mixture())
    batch, guide = model.sample_batch(16), MeanField(model)
    elbos = []
    for starts in (None, 16):
        inference = LocalInference(steps=2, rate=0.1, starts=starts)
        torch.manual_seed(0)
        elbos.append(training_loss(model, guide, batch, inference).info.elbo_NB[0].mean())
    assert elbos[1] > elbos[0] + 10


ONE_MODE = {
    **{name: make for name, make in (EXACT | BY_QUANTILES).items() if "mixture" not in name},
    "mixture of one": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(1)), dist.Normal(T([0.0]), 1.0)),
    "autoregressive": lambda: ThoughtDensity(AutoregressivePrior(SHAPE, 1, 8, 1)),
}
SEVERAL_MODES = {
    **{name: make for name, make in EXACT.items() if "mixture" in name},
    "autoregressive of mixtures": lambda: ThoughtDensity(AutoregressivePrior(SHAPE, 1, 8, 1, components=2)),
    "inside a transform": lambda: dist.TransformedDistribution(EXACT["mixture"](), torch.distributions.ExpTransform()),
    "Pyro's own": lambda: dist.MixtureOfDiagNormals(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)),
}


@pytest.mark.parametrize("name", [*ONE_MODE, *SEVERAL_MODES])
def test_it_is_known_which_priors_may_have_several_modes(name):
    fn = (ONE_MODE | SEVERAL_MODES)[name]().expand_by([2])
    assert has_several_modes({"z": fn}) == (name in SEVERAL_MODES)


def test_the_number_of_starts_and_what_it_costs():
    one, several = model_of(prior_of(horseshoe)), model_of(far_mixture())
    inference = LocalInference(steps=8)
    assert number_of_starts(one, MeanField(one), inference) == 1
    assert number_of_starts(several, MeanField(several), inference) == SEVERAL
    assert number_of_starts(several, Langevin(several), inference) == 1  # one chain, and no fit
    assert number_of_starts(several, MeanField(several), replace(inference, noise="reused")) == 1
    assert passes_of_fit(one, MeanField(one), inference) == 16
    assert passes_of_fit(one, MeanField(one), replace(inference, starts=2)) == 2 * 16 + 2 * 16 + 8
    for wrong in ({"starts": 0}, {"starts": 2, "noise": "reused"}):
        with pytest.raises(UsageError, match="tart"):
            LocalInference(**wrong)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_value_is_from_the_component_that_is_most_probable(shape):
    """Against brute force over the components, for whole-site mixtures and mixtures by coordinate."""
    prior = far_mixture()
    value = prior.mean_MLKD[2].expand(*shape, *SHAPE) + 0.1
    whole = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits_M), prior._components())
    mean, variance = component_at(whole, value)
    torch.testing.assert_close(mean, prior.mean_MLKD[2].expand(*shape, *SHAPE))
    torch.testing.assert_close(variance, (2 * prior.log_scale_MLKD[2]).exp().expand(*shape, *SHAPE))
    by_coordinate = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(*SHAPE, 2)), dist.Normal(T([-3.0, 3.0]).expand(*SHAPE, 2), 1.0)
    ).to_event(3)
    mean, _ = component_at(by_coordinate, T([[-1.0, 2.0], [0.5, -4.0]]).view(*SHAPE).expand(*shape, *SHAPE))
    torch.testing.assert_close(mean, T([[-3.0, 3.0], [3.0, -3.0]]).view(*SHAPE).expand(*shape, *SHAPE))


def test_a_thought_is_from_the_component_that_is_most_probable_after_those_before():
    prior = AutoregressivePrior(SHAPE, 1, 8, 1, components=3, spread=5.0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        z_BLKD = prior.sample(torch.Size([200]))
        mean, variance = prior.component_at(z_BLKD)
    assert (((z_BLKD - mean) ** 2 / variance).mean() - 1).abs() < 0.15  # a normal's own distance, as clusters are far
    assert len(mean[:, 0].flatten(1).unique(dim=0)) == 3  # the first thought is after none


def test_it_is_said_where_q_ends_worse_than_the_prior():
    model = model_of(far_mixture())
    batch, guide = model.sample_batch(8), MeanField(model)
    bad = LocalInference(steps=1, rate=1e-6, starts=1, init=replace(LocalInference().init, log_var=5.0))
    found = evaluate(model, guide, [batch], bad, ["bound", "prior"], samples=4)
    assert re.fullmatch(r"q ends worse than the prior, by [\d.]+ nats per sequence .*starts.*", found.worse_than_prior)
    for estimators, inference in ((["bound", "prior"], LocalInference(steps=32, rate=0.1)), (["bound"], bad)):
        assert evaluate(model, guide, [batch], inference, estimators, samples=4).worse_than_prior is None
