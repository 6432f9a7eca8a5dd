"""`JointCovariance`: exact where the joint posterior of several sites is one Gaussian, which separate ones miss."""

import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal

from ltm_pyro.contracts import PARTICLES, ThoughtShape
from ltm_pyro.guides import FullCovariance, JointCovariance
from ltm_pyro.inference.elbo import Draws, elbo_terms, sum_log_probs
from ltm_pyro.inference.local import infer_local, init
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import HierarchicalPrior, LinearGaussianModel


@pytest.fixture
def model():
    """Observations that are linear in thoughts, which are linear in a topic."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 2))
    model.prior = HierarchicalPrior(model.prior.shape, topic=2)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.prior.log_scale_LKD.fill_(-0.5)
    return model.eval()


def log_evidence(model, batch):
    """log N(y; A m, A S Aᵀ + s²): thoughts are a linear map of the noise of the prior."""
    prior = model.prior

    def thoughts(noise_N):
        u_U, e_LD = noise_N[:2], noise_N[2:].view(2, 2)
        first = prior.above[0](u_U) + prior.log_scale_LKD[0, 0].exp() * e_LD[0]
        second = prior.above[1](u_U) + prior.below[0](first) + prior.log_scale_LKD[1, 0].exp() * e_LD[1]
        return torch.cat([first, second])

    zero_N = torch.zeros(6)
    jacobian = torch.autograd.functional.jacobian(thoughts, zero_N)
    matrix = model.matrix_TN @ jacobian
    covariance = matrix @ matrix.T + model.noise**2 * torch.eye(len(matrix))
    return MultivariateNormal(model.matrix_TN @ thoughts(zero_N), covariance).log_prob(model.observed(batch))


@pytest.mark.parametrize("noise", ["fresh", "antithetic"])
def test_it_is_exact_where_sites_depend_on_each_other(model, noise):
    batch = model.sample_batch(4)
    evidence_B, gaps = log_evidence(model, batch), {}
    inference = LocalInference(steps=300, rate=0.05, particles=16, kl="path", noise=noise)
    for guide_class in (JointCovariance, FullCovariance):
        guide = guide_class(model)
        state, _ = infer_local(model, guide, batch, inference)
        with torch.no_grad():  # every draw of an exact q has the evidence
            elbo_SB = elbo_terms(model, guide, batch, state.parameters, Draws(200, kl="sampled")).elbo_B
        gaps[guide_class] = (evidence_B - elbo_SB).abs()
    assert gaps[JointCovariance].max() < 0.05
    assert (gaps[FullCovariance].mean(0) > 0.4).all()


def test_its_density_is_that_of_one_gaussian(model):
    """By hand: the factor of all coordinates from those of the sites."""
    batch = model.sample_batch(3)
    guide = JointCovariance(model)
    local = init(model, guide, batch, LocalInference()).parameters
    local = {name: x + 0.3 * torch.randn_like(x) for name, x in local.items()}
    with pyro.plate(PARTICLES, 5, dim=-2):
        trace = poutine.trace(guide).get_trace(batch, local)
    values = [trace.nodes[name]["value"].flatten(2) for name in guide.sites]
    factor_BNN, first = torch.zeros(3, 6, 6), 0
    for name, value in zip(guide.sites, values, strict=True):
        last = first + value.shape[-1]
        own = local[f"{name}_factor"]
        factor_BNN[:, first:last, first:last] = own.tril(-1) + own.diagonal(dim1=1, dim2=2).exp().diag_embed()
        if first:
            factor_BNN[:, first:last, :first] = local[f"{name}_cross"]
        first = last
    whole = MultivariateNormal(torch.cat([local[f"{name}_loc"] for name in guide.sites], -1), scale_tril=factor_BNN)
    torch.testing.assert_close(sum_log_probs(trace, guide.sites), whole.log_prob(torch.cat(values, -1)))
    variance_BN = torch.cat([guide.posterior(name, local).variance.flatten(1) for name in guide.sites], -1)
    torch.testing.assert_close(variance_BN, whole.variance)
