"""What all sequences share: its KL, its place in the loss, and what a sparse prior makes of it."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ltm_pyro.contracts import UsageError
from ltm_pyro.elbo import Draws, elbo_terms
from ltm_pyro.guides import MeanField
from ltm_pyro.inference import LocalInference
from ltm_pyro.local import begin
from ltm_pyro.models import MixturePrior, SparsePrior
from ltm_pyro.shared import Shared, global_kl
from ltm_pyro.svi import DualRateSVI


def test_the_kl_of_a_normal_is_the_closed_form():
    shared = Shared("g", dist.Normal, torch.zeros(3), torch.ones(3), start=torch.tensor([0.5, -1.0, 2.0]), scale=0.3)
    truth = kl_divergence(Normal(shared.loc, shared.log_scale.exp()), Normal(0.0, 1.0)).sum()
    found = torch.stack([shared.kl() for _ in range(500)]).detach()
    assert abs(found.mean() - truth) < 3 * found.std() / 500**0.5


def test_a_log_normal_is_scored_with_its_jacobian():
    """KL of log-normals is that of the normals behind them."""
    zero = torch.zeros(2)
    shared = Shared("g", dist.LogNormal, zero, torch.ones(2), start=torch.tensor([2.0, 0.5]), scale=0.3)
    truth = kl_divergence(Normal(shared.loc, shared.log_scale.exp()), Normal(0.0, 1.0)).sum()
    found = torch.stack([shared.kl() for _ in range(500)]).detach()
    assert abs(found.mean() - truth) < 3 * found.std() / 500**0.5


def test_it_is_charged_once_per_corpus(tiny_model, tiny_batch):
    """A batch of 3 out of 300 pays a hundredth; the bound of a sequence pays nothing."""
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
    local = begin(model, guide, batch, LocalInference()).parameters
    with torch.no_grad():
        terms = elbo_terms(model, guide, batch, local, Draws(4))
    assert terms.kl_B.abs().max() < 1e-6, "q starts at the prior given the scales"


def test_responsibilities_say_which_component(tiny_decoder):
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
