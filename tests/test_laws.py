"""Properties that every prior and every guide must have, in every combination. Shapes as in the package."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, autoguide

from ltm_pyro.analysis.reference import KERNELS, ChainOptions, run_chains
from ltm_pyro.contracts import SEQUENCES, Init, ThoughtShape, make_batch
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.global_latents import global_kl
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.learning_rates import slow_parameters
from ltm_pyro.inference.local import infer_local, init, training_loss
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, LatentThoughtModel
from tests.laws import GUIDES, PAIRS, PRIORS, make_guide, make_prior

NO_FAST_STEPS = {"Amortized": "an encoder takes no fast steps", "Langevin": "a sampler maximises nothing"}
UNNORMALISED = {"EnergyPrior": "its density is known up to a constant, and its samples are approximate"}
DRAWS = 10_000
INFERENCE = LocalInference(steps=30, rate=0.05, particles=2, init=Init(log_var=-3.0, jitter=1.0), starts=1)


@pytest.fixture
def make_model():
    """Makes a model of a prior and a tiny decoder."""

    def make(name):
        decoder = Decoder(11, layers=2, width=8, heads=2, thoughts=1, window=4, length=8, thought_width=2)
        return LatentThoughtModel(make_prior(name), decoder)

    return make


@pytest.fixture
def batch():
    return make_batch(torch.randint(1, 11, (2, 6)), torch.tensor([6, 5]), start_token=0)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_guide_infers_under_every_prior(prior, guide, make_model, batch):
    model = make_model(prior)
    guide = make_guide(guide, model)
    state, info = infer_local(model, guide, batch, INFERENCE)
    assert info.elbo_NB.isfinite().all()
    if guide.uses_fast_steps:
        assert info.elbo_NB[-5:].mean() > info.elbo_NB[:5].mean() + 0.5, "30 fast steps do not improve the ELBO"
    else:
        assert type(guide).__name__ in NO_FAST_STEPS

    with torch.no_grad():
        for particles, shape in ((None, (2,)), (3, (3, 2))):
            terms = elbo_terms(model, guide, batch, state.parameters, Draws(particles))
            assert terms.elbo_B.shape == shape
            assert terms.elbo_B.isfinite().all()
    drawn = Predictive(model, guide=LocalPosterior(guide, state), num_samples=3)(batch._replace(targets_BT=None))
    assert drawn["tokens"].shape == (3, 2, 6)
    assert set(drawn) >= set(prior_sites(model, 1))


@pytest.mark.parametrize("prior", sorted(set(PRIORS) - set(UNNORMALISED)))
def test_initial_q_does_not_depend_on_the_random_seed(prior, make_model, batch):
    model = make_model(prior)
    guide, starts = make_guide("MeanField", model), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(init(model, guide, batch, LocalInference()).parameters)
    torch.testing.assert_close(*starts)


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_slow_step_reaches_every_parameter(prior, slow_gradient, make_model, batch):
    model = make_model(prior)
    inference = LocalInference(steps=1, slow_gradient=slow_gradient, init=INFERENCE.init)
    (training_loss(model, make_guide("MeanField", model), batch, inference).loss + global_kl(model)).backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without_gradient
    assert all(p.grad.abs().sum() > 0 for p in model.prior.parameters())


AUTOGUIDES = [
    autoguide.AutoDelta,
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoLaplaceApproximation,
]


@pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")  # ours is made once per size
@pytest.mark.parametrize("auto", AUTOGUIDES)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_stock_autoguide_fits_every_prior(prior, auto, make_model, batch):
    model = make_model(prior)
    svi = SVI(model, auto(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    assert all(math.isfinite(svi.step(batch)) for _ in range(2))


@pytest.mark.parametrize("method", KERNELS)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_chain_runs_under_every_prior(prior, method, make_model, batch):
    model = make_model(prior)
    found = run_chains(model, batch.select(torch.tensor([0])), method, 4, ChainOptions(chains=2, warmup=2, thin=1))
    assert found.densities.z_SBLKD.shape == (2, 4, 1, 2, 1, 2)
    assert found.densities.z_SBLKD.isfinite().all()


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
def test_the_slow_step_reaches_an_encoder(slow_gradient, make_model, batch):
    model = make_model("LearnedGaussianPrior")
    guide = make_guide("Amortized", model)
    torch.nn.init.normal_(guide.leave.weight)
    inference = LocalInference(steps=1, slow_gradient=slow_gradient)
    training_loss(model, guide, batch, inference).loss.backward()
    assert {p for _, p in slow_parameters(model, guide)} > set(guide.parameters())
    assert all(p.grad.abs().sum() > 0 for p in guide.parameters())
    state, _ = infer_local(model, guide, batch, inference)
    assert not any(x.requires_grad for x in state.parameters.values())
    again, _ = infer_local(model, guide, batch, inference, state)
    torch.testing.assert_close(again.parameters, state.parameters)
    asked = LocalInference(steps=0)
    torch.testing.assert_close(
        infer_local(model, guide, batch, asked)[0].parameters, init(model, guide, batch, asked).parameters
    )


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_half_precision_stays_in_the_decoder(prior, guide, make_model, batch):
    model = make_model(prior).float()
    torch.set_default_dtype(torch.float32)
    try:
        guide = make_guide(guide, model)
        state = init(model, guide, batch, LocalInference())
        terms = []
        for half in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
                terms.append(elbo_terms(model, guide, batch, state.parameters))
    finally:
        torch.set_default_dtype(torch.float64)
    assert terms[1].kl_B.dtype == torch.float32
    torch.testing.assert_close(terms[1].kl_B, terms[0].kl_B, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(terms[1].log_likelihood_B, terms[0].log_likelihood_B, rtol=0.05, atol=0.3)


def joint(prior, values):
    """z, and the prior's log-probability with its sites at ``values``, each with a leading axis."""
    size = len(next(iter(values.values())))
    replayed = poutine.trace(poutine.condition(prior_in_plate(prior, size), values)).get_trace()
    replayed.compute_log_prob()
    total = sum(node["log_prob"] for name, node in replayed.nodes.items() if name in values)
    return replayed.nodes["_RETURN"]["value"], total


def sampled_site(name, node):
    return node["type"] == "sample" and not node["is_observed"] and name != SEQUENCES


def prior_in_plate(prior, size):
    def sample_prior():
        with torch.no_grad(), pyro.plate(SEQUENCES, size, dim=-1):
            return prior()

    return sample_prior


@pytest.mark.parametrize("name", PRIORS)
def test_log_probability_is_normalised_and_matches_the_samples(name):
    """E_r[p / r] = 1 for a wide normal r, and the moments under p / r are those of the prior's samples."""
    if name in UNNORMALISED:
        pytest.skip(UNNORMALISED[name])
    prior = make_prior(name, ThoughtShape(2, 1, 1))
    sampled = poutine.trace(prior_in_plate(prior, DRAWS)).get_trace()
    sites = {n: x["value"] for n, x in sampled.nodes.items() if sampled_site(n, x)}
    proposal = torch.distributions.Normal(0.0, 2.5)
    proposed = {n: proposal.sample(x.shape) for n, x in sites.items()}
    z_SLKD, log_p_S = joint(prior, proposed)
    weight_S = (log_p_S - sum(proposal.log_prob(x).flatten(1).sum(1) for x in proposed.values())).exp()
    assert abs(weight_S.mean() - 1) < 4 * weight_S.std() / math.sqrt(DRAWS)

    exact_SLKD = sampled.nodes["_RETURN"]["value"]
    for power in (1, 2):
        estimate = weight_S @ z_SLKD.flatten(1) ** power / DRAWS
        std = (weight_S[:, None] * z_SLKD.flatten(1) ** power).std(0) + exact_SLKD.flatten(1).pow(power).std(0)
        error = (estimate - exact_SLKD.flatten(1).pow(power).mean(0)).abs()
        assert (error < 4 * std / math.sqrt(DRAWS)).all()


@pytest.mark.parametrize("name", PRIORS)
def test_a_state_dict_makes_the_same_prior(name):
    prior, other = make_prior(name), make_prior(name)
    other.load_state_dict(prior.state_dict())
    sites = poutine.trace(prior_in_plate(prior, 3)).get_trace()
    values = {n: x["value"] for n, x in sites.nodes.items() if sampled_site(n, x)}
    torch.testing.assert_close(joint(other, values)[1], joint(prior, values)[1])


@pytest.mark.parametrize("prior", ["LearnedGaussianPrior", "HierarchicalPrior"])
@pytest.mark.parametrize("guide", ["MeanField", "LowRank", "BlockCovariance", "FullCovariance"])
def test_closed_form_kl_is_the_average_of_its_draws(prior, guide, make_model, batch):
    model = make_model(prior)
    guide = make_guide(guide, model)
    state, _ = infer_local(model, guide, batch, INFERENCE)
    local = {name: x + 0.1 * torch.randn_like(x) for name, x in state.parameters.items()}
    with torch.no_grad():
        batch = batch.crop(0, 1)  # the KL does not depend on tokens
        exact_SB = elbo_terms(model, guide, batch, local, Draws(DRAWS)).kl_B.expand(DRAWS, 2)
        sampled_SB = elbo_terms(model, guide, batch, local, Draws(DRAWS, kl="path")).kl_B
    error_B = (sampled_SB.var(0) + exact_SB.var(0)).sqrt() / math.sqrt(DRAWS)
    assert ((exact_SB.mean(0) - sampled_SB.mean(0)).abs() < 3 * error_B).all()
    assert (exact_SB.std(0) < 0.9 * sampled_SB.std(0)).all(), "the closed form is not in use"
