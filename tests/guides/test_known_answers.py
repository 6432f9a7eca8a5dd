"""Guides on models with a known posterior: what they should find, and which bounds they must not report."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.distributions import kl_divergence

from ltm_pyro.contracts import Init, ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FlowGuide, Langevin, Laplace, LowRank, MeanField, Point
from ltm_pyro.guides.fused_normal import FusedNormal
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import EnergyPrior, LearnedGaussianPrior, LinearGaussianModel, SparsePrior, TwoModesModel


class Positive(PyroModule):
    """Log-normal thoughts."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self):
        return pyro.sample("z", dist.LogNormal(torch.zeros(self.shape), 1.0).to_event(3))


@pytest.fixture
def known():
    model = LinearGaussianModel(ThoughtShape(1, 1, 3))
    return model, model.sample_batch(4)


def expected_elbo(model, guide, batch, state, draws=2000):
    with torch.no_grad():
        return elbo_terms(model, guide, batch, state.parameters, Draws(draws)).elbo_B.mean(0)


@pytest.mark.parametrize("learned", [2, 4])  # q's parameters alone, or the prior's too
def test_the_kl_of_normals_equals_torchs(learned):
    normals = torch.randn(2, 5, 1, 3), torch.rand(2, 5, 1, 3) + 0.1, torch.randn(4, 3), torch.rand(4, 3) + 0.1
    for x in normals[:learned]:
        x.requires_grad_()
    found = []
    for family in (FusedNormal, dist.Normal):
        kl = kl_divergence(family(*normals[:2]).expand([2, 5, 4, 3]).to_event(1), dist.Normal(*normals[2:]).to_event(1))
        found.append([kl, *torch.autograd.grad((kl * torch.arange(4.0)).sum(), normals[:learned])])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_laplace_is_exact_if_the_posterior_is_gaussian(known):
    model, batch = known
    guide = Laplace(model)
    state, _ = infer_local(model, guide, batch, LocalInference(steps=200, rate=0.1))
    mean_BN, covariance_BNN = model.posterior(batch)
    factor = state.parameters["z_factor"]
    torch.testing.assert_close(state.parameters["z_loc"], mean_BN, atol=1e-3, rtol=0)
    torch.testing.assert_close(factor @ factor.mT, covariance_BNN, atol=1e-6, rtol=1e-4)
    continued = LocalInference(steps=1, rate=1e-6)  # starts from the finalized state
    again, _ = infer_local(model, guide, batch, continued, state)
    torch.testing.assert_close(again.parameters["z_factor"], factor, atol=1e-4, rtol=1e-3)


def test_laplace_has_the_priors_variance_in_unobserved_directions():
    model = LinearGaussianModel(ThoughtShape(1, 1, 6), length=3)
    model.prior = LearnedGaussianPrior(model.prior.shape)
    model.prior.log_scale_LKD.data.fill_(1.1)
    batch = model.sample_batch(4)
    state, _ = infer_local(model, Laplace(model), batch, LocalInference(steps=300, rate=0.2))
    scale = torch.tensor(1.1).exp()
    precision_NN = torch.eye(6) / scale**2 + model.matrix_TN.T @ model.matrix_TN / model.noise**2
    factor = state.parameters["z_factor"]
    torch.testing.assert_close(factor @ factor.mT, torch.linalg.inv(precision_NN).expand(4, 6, 6), atol=1e-4, rtol=1e-3)


def test_laplace_uses_one_draw_of_global_latents():
    """Its Hessian is a difference of gradients, which must belong to one density."""
    model = LinearGaussianModel(ThoughtShape(1, 1, 3), noise=0.3)
    model.prior = SparsePrior(model.prior.shape)
    batch = model.sample_batch(2)
    with fix_global_draws(model, 0) as draws:
        state, _ = infer_local(model, Laplace(model), batch, LocalInference(steps=200, rate=0.1))
    scaled_TN = model.matrix_TN * draws["z_scale"].flatten()
    precision_NN = torch.eye(3) + scaled_TN.T @ scaled_TN / model.noise**2
    torch.manual_seed(1)
    factor = Laplace(model).finalize(model, batch, {"z_unit_loc": state.parameters["z_unit_loc"]}, 1, 0.1)[
        "z_unit_factor"
    ]
    ratio = (factor @ factor.mT).diagonal(dim1=-2, dim2=-1) / torch.linalg.inv(precision_NN).diagonal()
    assert (ratio.log().abs() < 1).all(), "gradients of different draws of the scales were subtracted"


@pytest.mark.parametrize("guide_class", [Point, Laplace, Langevin])
@pytest.mark.parametrize("kl", ["exact", "path"])
def test_points_cover_constrained_priors(guide_class, kl):
    model = LinearGaussianModel(ThoughtShape(1, 1, 3))
    batch = model.sample_batch(4)
    model.prior = Positive(model.prior.shape)
    guide = guide_class(model)
    state, info = infer_local(model, guide, batch, LocalInference(steps=20, rate=0.01, kl=kl))
    assert info.elbo_NB.isfinite().all()
    assert expected_elbo(model, guide, batch, state, 10).isfinite().all()


def test_low_rank_finds_what_mean_field_cannot():
    model = LinearGaussianModel(ThoughtShape(1, 1, 3), noise=0.2)
    batch = model.sample_batch(4)
    evidence_B, gaps = model.log_evidence(batch), []
    for guide in (LowRank(model, rank=2), MeanField(model)):
        inference = LocalInference(steps=600, rate=0.1, particles=8, noise="antithetic", kl="path")
        state, _ = infer_local(model, guide, batch, inference)
        gaps.append((evidence_B - expected_elbo(model, guide, batch, state)).mean())
    assert -0.05 < gaps[0] < 0.5 * gaps[1]


def test_a_flow_covers_both_modes_and_a_gaussian_only_one():
    model = TwoModesModel(ThoughtShape(1, 1, 1), length=4)
    batch = model.sample_batch(6)
    gaps = {}
    for guide in (MeanField(model), FlowGuide(model)):
        inference = LocalInference(steps=300, rate=0.05, particles=32, init=Init(jitter=0.1))
        state, _ = infer_local(model, guide, batch, inference)
        gaps[type(guide)] = (model.log_evidence(batch) - expected_elbo(model, guide, batch, state)).mean()
    assert gaps[FlowGuide] > -0.05
    assert gaps[FlowGuide] < 0.5 * gaps[MeanField]


def test_langevin_samples_the_posterior():
    model = LinearGaussianModel(ThoughtShape(1, 1, 2))
    one = model.sample_batch(1)
    many = one.select(torch.zeros(2000, dtype=torch.long))
    state, _ = infer_local(model, Langevin(model), many, LocalInference(steps=120, rate=0.02))
    mean_BN, covariance_BNN = model.posterior(one)
    torch.testing.assert_close(state.parameters["z_loc"].mean(0), mean_BN[0], atol=0.08, rtol=0)
    torch.testing.assert_close(state.parameters["z_loc"].T.cov(), covariance_BNN[0], atol=0.08, rtol=0.15)


@pytest.mark.parametrize("family", [Point, Langevin])
def test_without_a_density_no_bound_is_reported(family, known):
    model, batch = known
    inference = LocalInference(steps=4, rate=0.05)
    evaluation = evaluate(model, family(model), [batch], inference, samples=2)
    assert set(evaluation.estimates) == {"prior"}
    assert set(evaluation.unavailable) == {"bound", "iwae", "reused_noise"}
    with pytest.raises(UsageError, match=f"No figure for bound: {family.__name__} has no density"):
        evaluate(model, family(model), [batch], inference, ["bound"])


def test_an_energy_has_a_bound_only_with_its_normaliser(tiny_model, tiny_batch):
    model = tiny_model()
    model.prior = EnergyPrior(model.decoder.thought_shape, width=8, steps=2)
    torch.nn.init.normal_(model.prior.tilt[-1].weight, std=0.3)
    before = evaluate(model, MeanField(model), [tiny_batch()], LocalInference(steps=1), ["bound", "prior"], samples=2)
    assert "--normaliser" in before.unavailable["bound"]
    assert not before.estimates["prior"].is_bound

    value, error = model.prior.estimate_normaliser(20_000)
    z_SLKD = torch.randn(20_000, *model.decoder.thought_shape)
    density_S = model.prior.log_density(z_SLKD) - torch.distributions.Normal(0, 1).log_prob(z_SLKD).flatten(1).sum(1)
    assert abs(density_S.detach().exp().mean() - 1) < 6 * error
    after = evaluate(model, MeanField(model), [tiny_batch()], LocalInference(steps=1), ["bound"], samples=2)
    assert not after.estimates["bound"].is_bound
    assert value == pytest.approx(model.prior.log_normaliser.item())
