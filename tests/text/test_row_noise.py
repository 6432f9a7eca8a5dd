"""A row's noise is its own, whatever the distribution; rows and draws are independent of each other."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.contracts import SEQUENCES
from ltm_pyro.errors import UsageError
from ltm_pyro.text.row_noise import RowNoise

LOC = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 3, 4)
DISTRIBUTIONS = {
    "normal": lambda x: dist.Normal(x, 1.0).to_event(2),
    "laplace": lambda x: dist.Laplace(x, 1.0).to_event(2),
    "student": lambda x: dist.StudentT(4.0, x, 1.0).to_event(2),
    "gamma": lambda x: dist.Gamma(x.abs() + 0.1, 1.0).to_event(2),
    "uniform": lambda x: dist.Uniform(x, x + 1).to_event(2),
    "categorical": lambda x: dist.Categorical(logits=x).to_event(1),
    "low rank": lambda x: dist.LowRankMultivariateNormal(x[:, 0], x.mT[..., :2], x.new_ones(4)),
    "mixture": lambda x: dist.MixtureSameFamily(dist.Categorical(logits=x[:, :, 0]), dist.Normal(x, 1.0).to_event(1)),
}


def draw(fn, keys):
    with RowNoise(keys), pyro.plate(SEQUENCES, len(keys), dim=-1):
        return pyro.sample("z", fn)


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_row_alone_gets_what_it_gets_among_others(make):
    together = draw(make(LOC), [(7, row) for row in range(5)])
    for row in range(5):
        assert torch.equal(together[row : row + 1], draw(make(LOC[row : row + 1]), [(7, row)]))


def test_rows_and_seeds_and_draws_differ():
    fn, keys = dist.Normal(torch.zeros(2, 50), 1.0).to_event(1), [(0, 0), (0, 1)]
    with RowNoise(keys), pyro.plate(SEQUENCES, 2, dim=-1):
        first, second = pyro.sample("z", fn), pyro.sample("u", fn)
    rows = torch.cat([first, second, draw(fn, [(1, 0), (1, 1)])])
    assert (rows.corrcoef() - torch.eye(6)).abs().max() < 0.6  # 50 numbers a row: four standard errors


def test_other_rows_and_other_plates_are_left_alone():
    fn = dist.Normal(torch.zeros(3), 1.0)
    with RowNoise([(0, 0)]):
        torch.manual_seed(0)
        with pyro.plate(SEQUENCES, 3, dim=-1):
            assert torch.equal(pyro.sample("z", fn), torch.manual_seed(0) and fn.sample())


def test_particles_that_a_distribution_mixes_with_rows_are_refused():
    with RowNoise([(0, 0), (0, 1)]), pyro.plate("particles", 3, dim=-2), pyro.plate(SEQUENCES, 2, dim=-1):
        pyro.sample("u", dist.Normal(0.0, 1.0))
        with pytest.raises(UsageError, match="one at a time"):
            pyro.sample("z", dist.Categorical(torch.ones(4)))
