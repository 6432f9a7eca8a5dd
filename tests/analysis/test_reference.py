"""Reference chains agree with a known posterior, and the comparison shows where q is too narrow."""

from functools import partial

import numpy as np
import pytest
import scipy.signal
import torch
from pyro.infer import MCMC, NUTS

from ltm_pyro.analysis import sections
from ltm_pyro.analysis.against_reference import compare, compare_draws, differences, rms_correlation, thin
from ltm_pyro.analysis.classifiers import c2st
from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.reference import ChainOptions, convergence, run_chains
from ltm_pyro.analysis.sections import ReportInputs
from ltm_pyro.contracts import Init, ThoughtShape, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel, LinearGaussianModel

STILL = LocalInference(steps=0)


def chains(model, batch, method="nuts", samples=300, warmup=200, thin=1):
    options = DrawOptions(method=method, samples=samples, chains=ChainOptions(chains=2, warmup=warmup, thin=thin))
    return draw_batch_posterior(model, MeanField(model), batch, STILL, options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "thin"), [("nuts", 1), ("langevin", 10)])
def test_chains_meet_the_known_posterior_and_show_a_narrow_q(known, exact, posterior, method, thin):
    batch = known.sample_batch(1)
    reference = chains(known, batch, method, thin=thin)
    table = compare(posterior(known, exact(known), batch), reference)
    assert (table.r_hat < 1.05).all()
    noise = 4 / table.ess.values[0] ** 0.5 + 4 / 400**0.5
    assert (abs(table.mean_error) < noise).all()
    assert (abs(np.log(table.scale_ratio)) < noise).all()
    assert abs(table.c2st[0] - 0.5) < 3 * table.c2st_stderr[0]
    assert abs(table.correlation[0] - table.correlation_q[0]) < 0.1
    narrow = compare(posterior(known, exact(known, scale=0.7), batch), reference)
    assert not any(differences(table, 0.01).values())
    assert differences(narrow, 0.01)["narrow"] == narrow.scale_ratio.size
    assert narrow.c2st[0] > 0.5 + 3 * narrow.c2st_stderr[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nuts_on_a_decoder_of_64_dimensions_converges_and_shows_a_narrow_q():
    torch.set_default_dtype(torch.float32)
    decoder = Decoder(50, layers=2, width=32, heads=2, thoughts=2, window=8, length=64, thought_width=16)
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    batch = make_batch(torch.randint(1, 50, (1, 64)), torch.tensor([64]), 0)
    guide, narrow = MeanField(model), LocalInference(steps=16, rate=0.1, init=Init(log_var=-3.0))
    # 400 draws have an effective sample size of 40, too few for R-hat
    reference = chains(model, batch, samples=800, warmup=300)
    q = draw_batch_posterior(model, guide, batch, narrow, DrawOptions(samples=400))
    table = compare(q, reference)
    torch.set_default_dtype(torch.float64)
    assert (table.r_hat < 1.05).all()
    assert float(table.scale_ratio.mean()) < 0.8
    assert differences(table, 0.01)["narrow"] > 16


def test_r_hat_of_chains_that_disagree():
    z = torch.randn(2, 200, 1, 1, 1, 2)
    assert (convergence(z)["r_hat"] < 1.05).all()
    assert (convergence(z)["ess"] > 200).all()
    z[1] += 3
    assert (convergence(z)["r_hat"] > 1.5).all()


def test_a_classifier_is_not_fooled_by_chains_that_move_slowly():
    """Two slow chains with q's distribution: their first draws differ from q's, draws from the entire chains do not."""
    random = np.random.default_rng(0)
    steps = (1 - 0.95**2) ** 0.5 * random.normal(size=(2, 2000, 20))
    slow = scipy.signal.lfilter([1], [1, -0.95], steps, axis=1).reshape(-1, 20)
    q = random.normal(size=(100, 20))
    told = c2st(q, thin(slow, 100))
    assert abs(told.mean - 0.5) < 3 * told.stderr
    assert c2st(q, slow[:100]).mean > 0.8


def test_root_mean_square_correlation():
    covariance = np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]])
    draws = np.random.default_rng(0).multivariate_normal(np.zeros(3), covariance, 20_000)
    assert rms_correlation(draws) == pytest.approx((0.64 / 3) ** 0.5, abs=0.01)


def test_one_coordinate_is_compared(exact, posterior):
    one = LinearGaussianModel(ThoughtShape(1, 1, 1))
    batch = one.sample_batch(1)
    found = compare(posterior(one, exact(one), batch), chains(one, batch, samples=50, warmup=20, method="langevin"))
    assert (found.correlation, found.correlation_q) == (0, 0)
    assert np.isfinite(found.c2st)


def test_what_cannot_be_compared(known, exact, posterior):
    q = posterior(known, exact(known), known.sample_batch(2))
    with pytest.raises(UsageError, match="not a Markov chain"):
        compare(q, q)
    other = LinearGaussianModel(ThoughtShape(2, 1, 3), seed=1)
    with pytest.raises(UsageError, match="does not have"):
        compare(q, chains(other, other.sample_batch(1), samples=25, warmup=5, method="langevin"))
    with pytest.raises(UsageError, match="got 2: give one"):
        run_chains(known, known.sample_batch(2), "nuts", 25, ChainOptions())


def test_the_correlation_of_a_chain_is_that_of_its_independent_draws():
    """A chain that repeats each of 40 draws 20 times has the chance correlation of 40 draws, not of 800."""
    draws = np.random.default_rng(0).normal(size=(40, 16))
    alone, chained = (compare_draws(draws, rows, 40)["correlation"] for rows in (draws, draws.repeat(20, 0)))
    assert chained == pytest.approx(alone, abs=0.02)
    assert rms_correlation(draws.repeat(20, 0)) > alone + 0.1


def test_what_a_chain_was_like_is_kept(known):
    """The draws are stock Pyro's to the last digit; energy, acceptance, tree depth and divergences are beside them."""
    batch = known.sample_batch(1)
    torch.manual_seed(3)
    found = run_chains(known, batch, "nuts", 30, ChainOptions(chains=2, warmup=10))
    torch.manual_seed(3)
    stock = []
    for _ in range(2):
        prior_sites(known, 1)  # draws, as `run_chains` does before each chain
        hook = partial(lambda means, kernel, *_: means.append(float(kernel._mean_accept_prob)), accepted := [])
        mcmc = MCMC(NUTS(known, max_tree_depth=6), 30, 10, disable_progbar=True, hook_fn=hook)
        mcmc.run(batch)
        stock.append((mcmc, accepted[-1]))
    assert torch.equal(found.sites["z"], torch.stack([mcmc.get_samples()["z"] for mcmc, _ in stock]))
    for chain, (mcmc, mean) in enumerate(stock):
        acceptance = found.steps["acceptance_rate"][chain].mean()
        assert acceptance == pytest.approx(mean)
        diverged = mcmc.diagnostics()["divergences"]["chain 0"]
        assert found.steps["diverging"][chain].nonzero()[0].tolist() == diverged
    assert found.steps["tree_depth"].min() >= 1
    assert found.steps["tree_depth"].max() <= 6
    potential = -(found.densities.log_prior_SB + found.densities.log_likelihood_SBT.sum(-1))[..., 0]
    kinetic = found.steps["energy"][:, 1:] - potential[:, :-1].numpy()  # a step begins where the one before has ended
    assert (kinetic > 0).all()
    assert kinetic.mean() == pytest.approx(3, abs=1), "half of six dimensions"


def test_chains_that_never_move_say_nothing_about_q(known, exact, posterior):
    batch = known.sample_batch(1)
    reference = chains(known, batch, samples=25, warmup=5, method="langevin")
    reference.tree["posterior"]["z"].values[..., 0] = 1.0
    with pytest.raises(UsageError, match="never moves"):
        compare(posterior(known, exact(known), batch), reference)


def test_q_is_not_blamed_for_chains_that_have_not_converged(known, exact, posterior):
    """q is exact, and one of the two chains is far off."""
    batch = known.sample_batch(1)
    reference = chains(known, batch, samples=60, warmup=20)
    reference.tree["posterior"]["z"].values[0] += 20.0
    reference.stats["r_hat"].values[:] = 3.0
    section = sections.reference(ReportInputs(posterior(known, exact(known), batch), reference=reference))
    assert section.good is False
    assert "q is not the posterior" not in section.verdict
    assert "either may be wrong" in section.verdict


def test_a_report_of_chains_says_how_they_went(known):
    few = sections.chains(ReportInputs(chains(known, known.sample_batch(1), samples=40, warmup=20)))
    assert few.good is False
    assert "effective sample size" in few.verdict
    assert len(few.pictures) == 2
