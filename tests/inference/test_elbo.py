"""The ELBO's terms against closed forms and against Pyro's own estimators."""

import math

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam

from ltm_pyro.contracts import Init, ThoughtShape, make_batch, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FullCovariance, MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms, log_weights
from ltm_pyro.inference.local import infer_local, init
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel, LinearGaussianModel, TwoModesModel


@pytest.fixture
def fitted(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    state, _ = infer_local(model, guide, batch, LocalInference(steps=3, init=Init(log_var=-1.0, jitter=0.5)))
    return model, guide, batch, state


@pytest.mark.parametrize("estimator", [TraceMeanField_ELBO, Trace_ELBO])
def test_the_elbo_equals_pyros_at_the_same_draws(fitted, estimator):
    model, guide, batch, state = fitted
    pyro.set_rng_seed(3)
    theirs = estimator().loss(model, LocalPosterior(guide, state), batch)
    pyro.set_rng_seed(3)
    terms = elbo_terms(model, guide, batch, state.parameters, Draws(kl="path" if estimator is Trace_ELBO else "exact"))
    assert -terms.elbo_B.sum().item() == pytest.approx(theirs, abs=1e-6)


def test_a_trace_does_not_depend_on_earlier_ones(tiny_model, tiny_batch):
    sequence_plate.cache_clear()
    model, batch = tiny_model(), tiny_batch()
    first, second = ([*poutine.trace(model).get_trace(batch).nodes] for _ in range(2))
    assert first == second


def test_particles_equal_pyros_vectorised_particles(fitted):
    model, guide, batch, state = fitted
    pyro.set_rng_seed(3)
    pyro_elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    theirs = pyro_elbo.loss(model, LocalPosterior(guide, state), batch)
    pyro.set_rng_seed(3)
    terms = elbo_terms(model, guide, batch, state.parameters, Draws(4))
    assert -terms.elbo_B.mean(0).sum().item() == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("guide_class", [MeanField, FullCovariance])
def test_weights_average_to_the_evidence_and_the_elbo_is_below_it(guide_class):
    model = LinearGaussianModel(
        ThoughtShape(1, 1, 2), noise=1.5
    )  # weak observations, so that the weights have a light tail
    batch = model.sample_batch(5)
    guide = guide_class(model)
    state, _ = infer_local(model, guide, batch, LocalInference(steps=200, rate=0.05, particles=16))
    with torch.no_grad():
        weights_SB = log_weights(model, guide, batch, state.parameters, 20_000)
    evidence_B = model.log_evidence(batch)
    ratio_SB = (weights_SB - evidence_B).exp()
    error_B = ratio_SB.std(0) / math.sqrt(len(ratio_SB))
    assert ((ratio_SB.mean(0) - 1).abs() < 4 * error_B).all()
    assert (weights_SB.mean(0) < evidence_B).all()


def test_exact_kl_equals_monte_carlo_kl(fitted):
    model, guide, batch, state = fitted
    with torch.no_grad():
        exact_B = elbo_terms(model, guide, batch, state.parameters).kl_B
        sampled_SB = elbo_terms(model, guide, batch, state.parameters, Draws(4000, kl="path")).kl_B
    error_B = sampled_SB.std(0) / math.sqrt(len(sampled_SB))
    assert ((sampled_SB.mean(0) - exact_B).abs() < 3 * error_B).all()


def test_the_model_with_two_modes_has_the_evidence_of_the_model_with_one(tiny_batch):
    one, two = (cls(ThoughtShape(1, 1, 2), length=4) for cls in (LinearGaussianModel, TwoModesModel))
    batch = one.sample_batch(3)
    guide = MeanField(one)
    local = init(one, guide, batch, LocalInference()).parameters
    with torch.no_grad():
        estimates = [log_weights(m, guide, batch, local, 200_000).logsumexp(0) - math.log(200_000) for m in (one, two)]
    torch.testing.assert_close(estimates[0], one.log_evidence(batch), atol=0.2, rtol=0)
    torch.testing.assert_close(estimates[1], two.log_evidence(batch), atol=0.2, rtol=0)


def test_guides_with_missing_or_extra_sites_are_refused(tiny_model, tiny_batch):
    model = tiny_model()

    class MissingSite(MeanField):
        def __call__(self, batch, local):
            return {}

    class ExtraSite(MeanField):
        def __call__(self, batch, local):
            pyro.sample("u", pyro.distributions.Normal(torch.zeros(batch.size), 1.0))
            return super().__call__(batch, local)

    batch = tiny_batch()
    local = init(model, MeanField(model), batch, LocalInference()).parameters
    with pytest.raises(UsageError, match="no site 'z', which the model samples"):
        elbo_terms(model, MissingSite(model), batch, local)
    with pytest.raises(UsageError, match="samples 'u', which the model does not have"):
        elbo_terms(model, ExtraSite(model), batch, local)


def test_the_parameter_store_stays_empty(fitted):
    assert not list(pyro.get_param_store().keys())


shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "thoughts": st.integers(0, 3),
        "thought_width": st.sampled_from([4, 8, 12]),
        "size": st.integers(1, 4),
        "particles": st.sampled_from([None, 1, 3]),
        "length": st.integers(1, 9),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_invariances_over_random_shapes(shape):
    torch.manual_seed(shape["seed"])
    decoder = Decoder(11, shape["layers"], 8, 2, shape["thoughts"], 4, 16, shape["thought_width"])
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    lengths_B = torch.randint(1, shape["length"] + 1, (shape["size"],))
    batch = make_batch(torch.randint(0, 11, (shape["size"], shape["length"])), lengths_B, 0)
    guide = MeanField(model)
    state, _ = infer_local(model, guide, batch, LocalInference(steps=2, init=Init(log_var=-40.0, jitter=1.0)))
    draws = Draws(shape["particles"])  # q is so narrow that its noise is negligible
    terms = elbo_terms(model, guide, batch, state.parameters, draws)
    lead = () if shape["particles"] is None else (shape["particles"],)
    assert terms.elbo_B.shape == (*lead, shape["size"])
    assert terms.elbo_B.isfinite().all()

    order_B = torch.randperm(shape["size"])
    permuted = elbo_terms(model, guide, batch.select(order_B), state.select(order_B).parameters, draws)
    torch.testing.assert_close(permuted.elbo_B, terms.elbo_B[..., order_B], atol=1e-4, rtol=1e-4)

    noise_BT = torch.randint(0, 11, batch.targets_BT.shape)
    other_padding = make_batch(torch.where(batch.mask_BT, batch.targets_BT, noise_BT), lengths_B, 0)
    padded = elbo_terms(model, guide, other_padding, state.parameters, draws)
    torch.testing.assert_close(padded.elbo_B, terms.elbo_B, atol=1e-4, rtol=1e-4)


def test_select_and_put_are_inverse(fitted):
    *_, state = fitted
    selected = state.select(torch.tensor([2, 0]))
    assert isinstance(selected, LocalState)
    restored = state.put(torch.tensor([2, 0]), selected)
    torch.testing.assert_close(restored.parameters["z_loc"], state.parameters["z_loc"])


@pytest.mark.parametrize(
    ("estimator", "scale_of_q"), [(Trace_ELBO, 1.0), (Trace_ELBO, 0.1), (TraceMeanField_ELBO, 0.1)]
)
def test_scale_handlers_work_as_in_pyro(fitted, estimator, scale_of_q):
    """A model and a guide inside ``poutine.scale`` have the same ELBO as in Pyro."""
    model, guide, batch, state = fitted

    class ScaledModel(type(model)):
        def forward(self, batch):
            with poutine.scale(scale=0.1):
                return super().forward(batch)

    class ScaledGuide(MeanField):
        def __call__(self, batch, local):
            with poutine.scale(scale=scale_of_q):
                return super().__call__(batch, local)

    kl = "path" if estimator is Trace_ELBO else "exact"
    scaled, scaled_guide = ScaledModel(model.prior, model.decoder), ScaledGuide(model)
    pyro.set_rng_seed(3)
    theirs = estimator().loss(scaled, LocalPosterior(scaled_guide, state), batch)
    ours = {}
    for name, pair in {"plain": (model, guide), "scaled": (scaled, scaled_guide)}.items():
        pyro.set_rng_seed(3)
        ours[name] = elbo_terms(*pair, batch, state.parameters, Draws(kl=kl))
    assert -ours["scaled"].elbo_B.sum().item() == pytest.approx(theirs, abs=1e-9)
    torch.testing.assert_close(ours["scaled"].log_likelihood_B, 0.1 * ours["plain"].log_likelihood_B)
    if scale_of_q == 0.1:
        torch.testing.assert_close(ours["scaled"].kl_B, 0.1 * ours["plain"].kl_B)


def test_priors_without_moments_start_at_zero_and_one():
    from ltm_pyro.inference.latent_sites import prior_moments

    mean, variance = prior_moments(pyro.distributions.StudentT(2.0).expand([4, 3]).to_event(1))
    assert (mean == 0).all()
    assert (variance == 1).all()


def test_models_inside_one_scope_keep_their_own_parameters():
    """Pyro's store knows parameters by name, and two models have the same names."""

    class Prior(PyroModule):
        def __init__(self, shape, value):
            super().__init__()
            self.shape, self.mean = tuple(shape), PyroParam(torch.full(tuple(shape), value))

        def forward(self):
            return pyro.sample("z", pyro.distributions.Normal(self.mean, torch.ones(self.shape)).to_event(3))

    models = []
    for value in (0.0, 3.0):
        models.append(LinearGaussianModel(ThoughtShape(1, 1, 3)))
        models[-1].prior = Prior(ThoughtShape(1, 1, 3), value)
    batch, guide = LinearGaussianModel(ThoughtShape(1, 1, 3)).sample_batch(2), MeanField(models[0])
    local = {"z_loc": torch.zeros(2, 1, 1, 3), "z_log_var": torch.zeros(2, 1, 1, 3)}
    with torch.no_grad(), no_param_store(models[0]):
        kl = [elbo_terms(model, guide, batch, local).kl_B for model in models]
    assert models[1].prior.mean.mean() == 3
    torch.testing.assert_close(kl[0], torch.zeros(2))
    torch.testing.assert_close(kl[1], torch.full((2,), 3 * 9 / 2))
