"""Global latent variables: their KL, its weight in the loss, and their use in the sparse prior."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch.distributions import Normal, kl_divergence

from ltm_pyro.analysis.calibration import Simulation, calibrate
from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.reference import ChainOptions
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.global_latents import GlobalLatent, fix_global_draws, global_kl
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import init
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import LinearGaussianModel, MixturePrior, SparsePrior


def test_the_kl_of_a_normal_equals_the_closed_form():
    latent = GlobalLatent(
        "g", dist.Normal, torch.zeros(3), torch.ones(3), init=torch.tensor([0.5, -1.0, 2.0]), scale=0.3
    )
    truth = kl_divergence(Normal(latent.loc, latent.log_scale.exp()), Normal(0.0, 1.0)).sum()
    result = torch.stack([latent.kl() for _ in range(500)]).detach()
    assert abs(result.mean() - truth) < 3 * result.std() / 500**0.5


def test_the_kl_of_a_log_normal_includes_the_jacobian():
    """The KL of two log-normals equals the KL of the normals of their logarithms."""
    zero = torch.zeros(2)
    latent = GlobalLatent("g", dist.LogNormal, zero, torch.ones(2), init=torch.tensor([2.0, 0.5]), scale=0.3)
    truth = kl_divergence(Normal(latent.loc, latent.log_scale.exp()), Normal(0.0, 1.0)).sum()
    result = torch.stack([latent.kl() for _ in range(500)]).detach()
    assert abs(result.mean() - truth) < 3 * result.std() / 500**0.5


def test_the_kl_counts_once_per_corpus(tiny_model, tiny_batch):
    """The loss of 3 sequences of 300 has a hundredth of the KL; the ELBO of a sequence does not include it."""
    model, batch = tiny_model(), tiny_batch()
    model.prior = SparsePrior(model.decoder.thought_shape)
    model.prior.scale.log_scale.data.fill_(-30.0)
    losses = []
    for corpus in (None, 300):
        torch.manual_seed(1)
        svi = DualRateSVI(model, MeanField(model), lambda _: {"lr": 0.0}, LocalInference(steps=1), corpus=corpus)
        losses.append(svi.step(batch))
    assert losses[0] - losses[1] == pytest.approx(0.99 * global_kl(model).item(), rel=1e-3)

    guide = MeanField(model)
    local = init(model, guide, batch, LocalInference()).parameters
    with torch.no_grad():
        terms = elbo_terms(model, guide, batch, local, Draws(4))
    assert terms.kl_B.abs().max() < 1e-6, "q starts at the prior given the scales"


def test_fixed_draws_stay_fixed_and_depend_on_the_seed_alone():
    model = LinearGaussianModel(ThoughtShape(1, 1, 3))
    model.prior = SparsePrior(model.prior.shape)
    scale = model.prior.scale
    with fix_global_draws(model, 1):
        first = scale()
        assert torch.equal(scale(), first)
        with fix_global_draws(model, 2):
            assert torch.equal(scale(), first)
        prior_sites(model, 1)  # a separate trace of the prior uses the same value
        assert torch.equal(scale(), first)
    assert not torch.equal(scale(), scale())
    torch.manual_seed(5)
    with fix_global_draws(model, 1):
        torch.testing.assert_close(scale(), first)


class Scaled(PyroModule):
    """One site whose scale is a global latent variable."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.scale = shape, GlobalLatent("g", dist.HalfCauchy, torch.ones(shape), init=torch.ones(*shape))

    def forward(self):
        return pyro.sample("z", dist.Normal(torch.zeros(self.shape), self.scale()).to_event(3))


def test_prior_sites_uses_the_fixed_draw():
    """`prior_sites` hides its own sites from outer handlers, but uses the fixed value."""
    model = LinearGaussianModel(ThoughtShape(1, 1, 3))
    model.prior = Scaled(model.prior.shape)
    with fix_global_draws(model, 1), poutine.trace() as outside:
        result, expected = prior_sites(model, 2)["z"].base_dist.scale, model.prior.scale()
    torch.testing.assert_close(result, expected.expand_as(result))
    assert list(outside.trace.nodes) == ["g"]


@pytest.mark.parametrize("method", ["guide", "langevin"])
def test_all_draws_of_a_posterior_use_one_value_of_the_global_latents(method):
    model = LinearGaussianModel(ThoughtShape(1, 1, 3))
    model.prior = SparsePrior(model.prior.shape)
    options = DrawOptions(method=method, samples=30, chains=ChainOptions(warmup=5))
    result = draw_batch_posterior(model, MeanField(model), model.sample_batch(2), LocalInference(steps=2), options)
    scale = result.z / result.group("posterior")["z_unit"].values
    assert float(scale.std(("chain", "draw", "sequence")).max()) < 1e-12


def test_calibration_uses_one_value_of_the_global_latents():
    """With uninformative data the prior is the exact posterior, if every step uses the same draw of the scales."""
    model = LinearGaussianModel(ThoughtShape(1, 1, 3), noise=1e4)
    model.prior = SparsePrior(model.prior.shape)
    model.prior.scale.log_scale.data.fill_(-0.7)

    def simulate(size):
        trace = poutine.trace(model.sample_prior).get_trace(size)
        z_BLKD = trace.nodes["_RETURN"]["value"]
        return Simulation({"z_unit": trace.nodes["z_unit"]["value"]}, model.sample_tokens(z_BLKD))

    result = calibrate(model, MeanField(model), LocalInference(steps=0), simulate, 200, samples=19)
    assert abs(result.coverage(np.array([0.9]))[0] - 0.9) < 4 * (0.09 / 200) ** 0.5
    assert result.p_value(199) > 0.01


def test_responsibilities_identify_the_component(tiny_decoder):
    prior = MixturePrior(tiny_decoder().thought_shape, components=3)
    prior.mean_MLKD.data = 3 * torch.randn_like(prior.mean_MLKD)
    found_MM = prior.responsibilities(prior.mean_MLKD.detach())
    assert found_MM.shape == (3, 3)
    torch.testing.assert_close(found_MM.detach(), torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found_MM.sum(-1).detach(), torch.ones(3))


def test_bad_arguments_are_refused(tiny_decoder):
    with pytest.raises(UsageError, match="at least 1 component, got 0"):
        MixturePrior(tiny_decoder().thought_shape, components=0)
    with pytest.raises(UsageError, match="tau above 0"):
        SparsePrior(tiny_decoder().thought_shape, tau=0.0)
