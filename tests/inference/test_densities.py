"""What is called a bound: a prior that is no density, a guide without gradients and a scaled model are found out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ltm_pyro.contracts import ThoughtShape, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import with_estimated_normaliser
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import GaussianPrior, LatentThoughtModel, LinearGaussianModel
from tests.no_densities import REFUSED, MixtureGuide, Program, factor, learned_factor, normal

FEW = LocalInference(steps=2)


@pytest.fixture
def with_prior(tiny_decoder):
    """A model with a program as its prior; ``checked`` is what `LatentThoughtModel` does."""

    def make(program, checked=True):
        decoder = tiny_decoder(thoughts=1, thought_width=2)
        prior = Program(decoder.thought_shape, program)
        model = LatentThoughtModel(prior if checked else GaussianPrior(decoder.thought_shape), decoder)
        model.prior = prior
        return model

    return make


@pytest.mark.parametrize(("program", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_no_density_is_refused_as_a_prior(with_prior, tiny_batch, program, message):
    """When the model is made, when a guide is made for it, and when it is fitted or evaluated."""
    with pytest.raises(UsageError, match=message):
        with_prior(program)
    model = with_prior(program, checked=False)
    with pytest.raises(UsageError, match=message):
        MeanField(model)
    guide = MeanField(with_prior(normal))
    with pytest.raises(UsageError, match=message):
        infer_local(model, guide, tiny_batch(), FEW)
    with pytest.raises(UsageError, match=message):
        evaluate(model, guide, [tiny_batch()], FEW, ["bound"])


def test_a_factor_needs_an_estimate_of_the_constant(with_prior, tiny_batch):
    """Without it there is no bound; with it the figures are those of the prior that it describes, N(0, 1/2)."""
    model, batch = with_prior(factor), tiny_batch()
    guide = MeanField(model)
    with pytest.raises(UsageError, match="normaliser is unknown; ask for an estimate with --normaliser"):
        evaluate(model, guide, [batch], FEW, ["bound", "iwae"])
    with pytest.raises(UsageError, match="No figure for prior: the prior's factor 'f' leaves it without draws"):
        evaluate(model, guide, [batch], FEW, ["prior"])
    known = with_estimated_normaliser(model, 200_000)
    coordinates = model.decoder.thought_shape[0] * 2
    assert known.prior.log_normaliser.item() == pytest.approx(500 - coordinates / 2 * math.log(2), abs=0.02)
    found = evaluate(known, guide, [batch], LocalInference(steps=40), ["iwae"], samples=200).estimates["iwae"]
    assert not found.is_bound
    narrow = with_prior(lambda self: pyro.sample("z", dist.Normal(torch.zeros(self.shape), 0.5**0.5).to_event(3)))
    narrow.decoder.load_state_dict(model.decoder.state_dict())
    expected = evaluate(narrow, guide, [batch], LocalInference(steps=40), ["iwae"], samples=200).estimates["iwae"]
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, abs=0.02)
    assert expected.is_bound


def test_a_factor_that_depends_on_what_is_learned_is_refused(with_prior):
    with pytest.raises(UsageError, match=r"The factor 'f' .* depends on what is learned"):
        with_prior(learned_factor)


def test_a_guide_without_reparameterised_draws_is_refused(with_prior, tiny_batch):
    model = with_prior(normal)
    guide = MixtureGuide(model)
    with pytest.raises(UsageError, match="site 'z' is a MixtureSameFamily without reparameterised samples"):
        infer_local(model, guide, tiny_batch(), FEW)
    with pytest.raises(UsageError, match="without reparameterised samples"):
        evaluate(model, guide, [tiny_batch()], FEW, ["bound"])
    evaluate(model, guide, [tiny_batch()], LocalInference(steps=0), ["bound"])  # without fast steps it is a bound


class OwnMixture(MixtureGuide, torch.nn.Module):
    """The same with parameters of its own, which no fast step moves: the slow step would follow the wrong gradient."""

    uses_fast_steps = False

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        MixtureGuide.__init__(self, model)
        self.shift = torch.nn.Parameter(torch.tensor(0.1))

    def posterior(self, name, local):
        return super().posterior(name, {key: x.detach() + self.shift for key, x in local.items()})


def test_a_guide_whose_own_parameters_have_no_gradient_is_refused_in_training(with_prior, tiny_batch):
    model, batch = with_prior(normal), tiny_batch()
    guide = OwnMixture(model)
    with torch.no_grad():
        local = infer_local(model, guide, batch, LocalInference(steps=0))[0].parameters
    with pytest.raises(UsageError, match="without reparameterised samples"):
        elbo_terms(model, guide, batch, local, Draws())
    with torch.no_grad():
        assert elbo_terms(model, guide, batch, local, Draws(kl="sampled")).elbo_B.isfinite().all()


class Bonus(LinearGaussianModel):
    """A number is added to the log joint density of every sequence."""

    def forward(self, batch):
        pyro.factor("bonus", torch.tensor(500.0))
        return super().forward(batch)


class Scaled(LinearGaussianModel):
    """Half of the whole log joint density, as Pyro allows."""

    def forward(self, batch):
        with poutine.scale(scale=0.5):
            return super().forward(batch)


class Sure(LinearGaussianModel):
    """A likelihood of tokens that is no distribution: every token has probability 2."""

    def observation(self, z_BLKD, batch):
        return Twice(torch.zeros(*z_BLKD.shape[:-3], batch.inputs_BT.shape[1], 3)).to_event(1)

    def observed(self, batch):
        return batch.targets_BT


class Twice(dist.Categorical):
    """Twice too large."""

    def __init__(self, logits, validate_args=None):
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return Twice(self.logits.expand(*batch_shape, 3))

    def log_prob(self, value):
        return super().log_prob(value).clamp(min=0) + torch.tensor(2.0).log()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scaled, "the model scales site 'z' by 0.5"),
        (Bonus, "the model adds the factor 'bonus'"),
        (Sure, "a token has the probability 2 under"),
    ],
)
def test_a_model_that_is_no_density_has_no_bound(make, message):
    model = make(ThoughtShape(2, 1, 2), vocabulary=3)
    batch = model.sample_batch(3)
    with pytest.warns(UserWarning, match=message):
        found = evaluate(model, MeanField(model), [batch], FEW, ["bound", "iwae"], samples=3)
    assert not any(score.is_bound for score in found.estimates.values())
    assert message in found.no_bound
    sound = LinearGaussianModel(ThoughtShape(2, 1, 2), vocabulary=3)
    found = evaluate(sound, MeanField(sound), [batch], FEW, ["bound", "iwae"], samples=3)
    assert all(score.is_bound for score in found.estimates.values())
    assert found.no_bound is None


def test_a_token_that_is_too_likely_in_one_row_alone_is_seen():
    class SureOfTwo(Sure):
        def observation(self, z_BLKD, batch):
            fn = super().observation(z_BLKD, batch)
            fn.base_dist.__class__ = TwiceOfTwo
            return fn

    model = SureOfTwo(ThoughtShape(2, 1, 2), vocabulary=3)
    batch = model.sample_batch(3)
    batch = batch._replace(targets_BT=torch.where(torch.arange(3)[:, None] == 2, 2, 0 * batch.targets_BT))
    with pytest.warns(UserWarning, match="a token has the probability 2 under"):
        evaluate(model, MeanField(model), [batch], FEW, ["bound"], samples=3)


class TwiceOfTwo(Twice):
    """Token 2 alone has probability 2."""

    def log_prob(self, value):
        return torch.where(value == 2, super().log_prob(value), torch.tensor(-2.0))


@pytest.mark.parametrize(
    ("estimators", "samples"), [(["iwae"], 64), (["ais"], 4), (["bound"], 1), (["iwae", "prior"], 2)], ids=str
)
def test_the_alarm_does_not_depend_on_what_is_asked_for(with_prior, tiny_batch, estimators, samples):
    model = with_prior(lambda self: pyro.sample("z", Louder(dist.Laplace(torch.zeros(self.shape), 1.0).to_event(3))))
    with pytest.warns(UserWarning, match="the KL is -.* nats, which no density has"):
        evaluate(model, MeanField(model), [tiny_batch()], FEW, estimators, samples=samples)


def test_the_last_alarm_is_a_negative_kl(with_prior, tiny_batch):
    """A prior whose own class is wrong: no look at its program can tell, but its KL is negative."""

    def program(self):
        base = dist.Laplace(torch.zeros(self.shape), 1.0).to_event(3)
        return pyro.sample("z", Louder(base))

    model = with_prior(program)
    with pytest.warns(UserWarning, match="the KL is -.* nats, which no density has"):
        found = evaluate(model, MeanField(model), [tiny_batch()], LocalInference(steps=10), ["bound"], samples=64)
    assert not found.estimates["bound"].is_bound


class Louder(dist.TorchDistribution):
    """A distribution whose density is e^20 times too large."""

    arg_constraints = {}
    has_rsample = True
    support = dist.constraints.independent(dist.constraints.real, 3)

    def __init__(self, base):
        self.base_dist = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Louder(self.base_dist.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.base_dist.rsample(torch.Size(sample_shape))

    def log_prob(self, value):
        return self.base_dist.log_prob(value) + 20.0


def test_a_plate_in_the_prior_is_no_matter_here(with_prior):
    """The plate of sequences itself has neither scale nor mask."""
    model = with_prior(normal)
    with sequence_plate(3):
        assert model.prior().shape == (3, *model.decoder.thought_shape)
