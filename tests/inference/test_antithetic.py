"""Antithetic draws: pairs whose noise has opposite signs, also where the mean of a site depends on the sites before."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ltm_pyro.contracts import PARTICLES, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.antithetic import Antithetic

SIZE, DRAWS = 3, 4


def draws(second):
    """Values of two sites, of which the second is made from the first."""

    def guide():
        with sequence_plate(SIZE):
            first = pyro.sample("first", dist.Normal(torch.ones(SIZE, 2), 1.0).to_event(1))
            pyro.sample("second", second(first))

    with Antithetic(), pyro.plate(PARTICLES, DRAWS, dim=-2), poutine.trace() as trace:
        guide()
    return trace.trace.nodes["first"]["value"], trace.trace.nodes["second"]["value"]


@pytest.mark.parametrize(
    "family",
    [
        lambda mean: dist.Normal(mean, 2.0).to_event(1),
        lambda mean: dist.MultivariateNormal(mean, scale_tril=torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        lambda mean: dist.LowRankMultivariateNormal(mean, torch.ones(SIZE, 2, 1), torch.ones(SIZE, 2)),
    ],
)
def test_a_pairs_noise_is_mirrored_at_its_own_means(family):
    first, second = draws(lambda first: family(3 * first))
    for noise in (first - 1, second - 3 * first):
        torch.testing.assert_close(noise[:2], -noise[2:])
        assert noise.abs().min() > 0


def test_a_spread_that_depends_on_other_sites_is_refused():
    with pytest.raises(UsageError, match="that of site 'second' depends on other sites: use fresh noise"):
        draws(lambda first: dist.Normal(first, first.exp()).to_event(1))
