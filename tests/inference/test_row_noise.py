"""A row's noise is its own, whatever the distribution; rows and draws are independent of each other."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from ltm_pyro.contracts import PARTICLES, SEQUENCES, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.row_noise import RowKeys, RowNoise, RowNoiseMode, keyed
from ltm_pyro.nn import attention

LOC = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 3, 4)
DISTRIBUTIONS = {
    "normal": lambda x: dist.Normal(x, 1.0).to_event(2),
    "laplace": lambda x: dist.Laplace(x, 1.0).to_event(2),
    "student": lambda x: dist.StudentT(4.0, x, 1.0).to_event(2),
    "gamma": lambda x: dist.Gamma(x.abs() + 0.1, 1.0).to_event(2),
    "dirichlet": lambda x: dist.Dirichlet(x.abs() + 0.1).to_event(1),
    "uniform": lambda x: dist.Uniform(x, x + 1).to_event(2),
    "exponential": lambda x: dist.Exponential(x.abs() + 0.1).to_event(2),
    "categorical": lambda x: dist.Categorical(logits=x).to_event(1),
    "bernoulli": lambda x: dist.Bernoulli(logits=x).to_event(2),
    "low rank": lambda x: dist.LowRankMultivariateNormal(x[..., 0, :], x.mT[..., :2], x.new_ones(4)),
    "mixture": lambda x: dist.MixtureSameFamily(dist.Categorical(logits=x[..., 0]), dist.Normal(x, 1.0).to_event(1)),
    "one for all rows": lambda x: dist.Normal(x.new_zeros(3), 1.0).to_event(1),
}
NUMBERS = {
    "normal": (lambda: torch.randn(4, 50_000), stats.norm.cdf),
    "normal_": (lambda: torch.empty(4, 50_000).normal_(), stats.norm.cdf),
    "normal of tensors": (lambda: torch.normal(torch.zeros(4, 50_000), 1.0), stats.norm.cdf),
    "float32": (lambda: torch.randn(4, 50_000, dtype=torch.float32), stats.norm.cdf),
    "like": (lambda: torch.randn_like(torch.zeros(4, 50_001)), stats.norm.cdf),
    "uniform": (lambda: torch.rand(4, 50_000), stats.uniform.cdf),
    "uniform_": (lambda: torch.empty(4, 50_000, dtype=torch.float32).uniform_(), stats.uniform.cdf),
}


def some_keys(rows, seed=0):
    """Keys of different rows of tokens, the same for the same row."""
    tokens = torch.tensor([[row, 1, 2] for row in rows])
    return RowKeys.of_batch(make_batch(tokens, torch.full((len(rows),), 3), start_token=0), seed)


def draw(fn, keys, particles=None, first=0):
    size = len(keys.key_B)
    if particles is None:
        with RowNoise(keys, first), pyro.plate(SEQUENCES, size, dim=-1):
            return pyro.sample("z", fn)
    with RowNoise(keys, first), pyro.plate(PARTICLES, particles, dim=-2), pyro.plate(SEQUENCES, size, dim=-1):
        return pyro.sample("z", fn)


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_row_alone_gets_what_it_gets_among_others(make):
    together, rows = draw(make(LOC), some_keys(range(5))), [3, 0, 4]
    assert torch.equal(draw(make(LOC[rows]), some_keys(rows)), together[rows])
    for row in range(5):
        assert torch.equal(together[row : row + 1], draw(make(LOC[row : row + 1]), some_keys([row])))


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_particles_may_come_in_parts(make):
    whole = draw(make(LOC), some_keys(range(5)), particles=6)
    parts = [draw(make(LOC), some_keys(range(5)), particles=n, first=first) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(make(LOC), some_keys(range(5))), whole[0])
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 6


@pytest.mark.parametrize(("make", "cdf"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_have_the_distribution_they_are_called_after(make, cdf):
    with RowNoiseMode(some_keys(range(4)).key_B, (4,)):
        numbers = make()
    for row in numbers:
        assert stats.kstest(row.numpy(), cdf).pvalue > 0.001
    ranks = numbers.argsort(1).argsort(1).double()
    assert (ranks.corrcoef() - torch.eye(4)).abs().max() < 0.02  # 50,000 numbers a row: 4.5 standard errors
    neighbours = torch.stack([ranks[:, 1:].flatten(), ranks[:, :-1].flatten()])
    assert neighbours.corrcoef()[0, 1].abs() < 0.01


def test_rows_and_seeds_and_draws_and_sites_differ():
    fn, keys = dist.Normal(torch.zeros(2, 5000), 1.0).to_event(1), some_keys(range(2))
    with RowNoise(keys), pyro.plate(SEQUENCES, 2, dim=-1):
        first, second = pyro.sample("z", fn), pyro.sample("u", fn)
    others = [draw(fn, some_keys(range(2), seed=1)), draw(fn, keys, first=1), draw(fn, keys.fold_in("fit", 1))]
    rows = torch.cat([first, second, *others])
    assert (rows.corrcoef() - torch.eye(10)).abs().max() < 0.07  # 5,000 numbers a row: five standard errors


def test_a_key_depends_on_the_tokens_and_not_on_padding():
    tokens, lengths = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0], [4, 3, 5, 0], [3, 4, 5, 0]]), torch.tensor([3, 2, 3, 3])
    keys = RowKeys.of_batch(make_batch(tokens, lengths, start_token=9), 0).key_B
    assert keys[0] == keys[3]
    assert len({*keys.tolist()}) == 3
    longer = torch.cat([tokens, torch.full((4, 3), 7)], dim=1)
    assert torch.equal(RowKeys.of_batch(make_batch(longer, lengths, start_token=9), 0).key_B, keys)
    assert not torch.equal(RowKeys.of_batch(make_batch(tokens, lengths, start_token=9), 1).key_B, keys)
    one_less = make_batch(tokens, lengths, start_token=9).crop(0, 2)
    assert len({*RowKeys.of_batch(one_less, 0).key_B.tolist()}) == 2


def test_noise_without_a_site_is_each_rows_own_as_well():
    def noise(rows):
        with keyed(some_keys(rows), "init"):
            return torch.randn(len(rows), 3), torch.rand_like(torch.zeros(len(rows), 2))

    for together, alone in zip(noise([2, 5, 7]), noise([5]), strict=True):
        assert torch.equal(together[1:2], alone)
    before = torch.get_rng_state()
    noise([1])
    assert torch.equal(torch.get_rng_state(), before)


def test_other_plates_are_left_alone_and_other_rows_refused():
    fn = dist.Normal(torch.zeros(3), 1.0)
    with RowNoise(some_keys([0])):
        torch.manual_seed(0)
        with pyro.plate("others", 3, dim=-1):
            assert torch.equal(pyro.sample("z", fn), torch.manual_seed(0) and fn.sample())
        with pyro.plate(SEQUENCES, 3, dim=-1), pytest.raises(UsageError, match=r"batch shape \(3,\) for 1 sequences"):
            pyro.sample("z", fn)
    with keyed(some_keys([0, 1])), pytest.raises(UsageError, match=r"noise of shape \(3, 2\), which cannot be divided"):
        torch.randn(3, 2)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_dropout_draws_no_noise(batch, dtype):
    """Torch counts its fused kernels among the operations that can; an encoder's rows need not be those of the keys."""
    q, k, v = torch.randn(3, batch, 2, 256, 32).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    keys = RowKeys(torch.arange(8), 0)
    with keyed(keys, "init"):
        found = attend(q, k, v, is_causal=True)
    torch.testing.assert_close(found, attend(q, k, v, is_causal=True), rtol=0, atol=0)


def test_an_attention_backend_is_tried_out_with_noise_that_is_no_guides():
    """Which happens at the first call, perhaps of an encoder while the sequences have noise of their own."""
    keys = RowKeys(torch.arange(8), 0)
    with keyed(keys, "init"):
        assert attention._why_unusable("sdpa", "cpu", torch.float32, 8, 5) == ""
