"""Discrete latents of a prior are summed out exactly: against mixtures, and against sums over all their values."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule

from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.enumeration import LIMIT
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local, init, number_of_starts
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import LatentThoughtModel, MixturePrior
from ltm_pyro.training.check_model import check_model

SUM_OUT = {"enumerate": "parallel"}


class Topic(PyroModule):
    """The first thing that a Bayesian tries: a topic of each sequence, and thoughts around its mean."""

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)
        self.mean = torch.nn.Parameter(1.5 * torch.randn(3, *self.shape))
        self.logits = torch.nn.Parameter(torch.randn(3))

    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(logits=self.logits), infer=SUM_OUT)
        return pyro.sample("z", dist.Normal(self.mean[topic], 0.5).to_event(3))


class Chain(Topic):
    """Two discrete and two continuous sites, each of which depends on those before it."""

    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(logits=self.logits), infer=SUM_OUT)
        level = pyro.sample("level", dist.Normal(topic.float(), 0.7))
        sign = pyro.sample("sign", dist.Bernoulli(logits=level), infer=SUM_OUT)
        mean = self.mean[topic] + (level * (1 - 2 * sign))[..., None, None, None]
        return pyro.sample("z", dist.Normal(mean, 0.5).to_event(3))


class Plain(Topic):
    """The same as `Topic`, written as a mixture."""

    def forward(self):
        components = dist.Normal(self.mean, 0.5).to_event(3)
        return pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components))


class Direct(Topic):
    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(logits=self.logits), infer=SUM_OUT)
        return self.mean[topic] + pyro.sample("z", dist.Normal(torch.zeros(self.shape), 0.5).to_event(3))


class Many(Topic):
    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(torch.ones(LIMIT + 1)), infer=SUM_OUT)
        return pyro.sample("z", dist.Normal(self.mean[0] + topic, 0.5).to_event(3))


class Endless(Topic):
    def forward(self):
        topic = pyro.sample("topic", dist.Poisson(3.0), infer=SUM_OUT)
        return pyro.sample("z", dist.Normal(self.mean[0] + topic[..., None, None, None], 0.5).to_event(3))


class Forked(Topic):
    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(logits=self.logits), infer=SUM_OUT)
        if topic == 0:
            pyro.sample("u", dist.Normal(0.0, 1.0))
        return pyro.sample("z", dist.Normal(self.mean[topic], 0.5).to_event(3))


@pytest.fixture
def make(tiny_decoder):
    def make(prior):
        torch.manual_seed(2)
        decoder = tiny_decoder(thought_width=2)
        return LatentThoughtModel(prior(decoder.thought_shape), decoder)

    return make


@pytest.mark.parametrize("particles", [None, 4])
def test_a_topic_is_the_mixture(particles, make, tiny_batch):
    """ELBO, its gradient and q's start, to the last digits."""
    batch, found = tiny_batch(), []
    for prior in (Topic, Plain):
        model = make(prior)
        guide = MeanField(model)
        local = init(model, guide, batch, LocalInference()).parameters
        torch.manual_seed(0)
        terms = elbo_terms(model, guide, batch, local, Draws(particles))
        gradients = torch.autograd.grad(terms.elbo_B.sum(), list(model.prior.parameters()))
        found.append((local, terms.elbo_B, terms.kl_B, gradients))
    torch.testing.assert_close(*found)


def test_several_sites_have_the_density_of_a_sum_over_all_values(make):
    model = make(Chain)
    assert len(model.enumerated) == 6
    with torch.no_grad():
        drawn = poutine.trace(model.sample_prior).get_trace(5)
        drawn.compute_log_prob()
    assert [name for name, node in drawn.nodes.items() if node["type"] == "sample"] == ["level", "z"]
    level_B, z_BLKD, prior = drawn.nodes["level"]["value"], drawn.nodes["z"]["value"], model.prior
    joint = []
    for topic, sign in itertools.product(range(3), (0.0, 1.0)):
        mean = prior.mean[topic] + (level_B * (1 - 2 * sign))[..., None, None, None]
        joint.append(
            prior.logits.log_softmax(0)[topic]
            + dist.Normal(float(topic), 0.7).log_prob(level_B)
            + dist.Bernoulli(logits=level_B).log_prob(torch.tensor(sign))
            + dist.Normal(mean, 0.5).to_event(3).log_prob(z_BLKD)
        )
    expected_B = torch.stack(joint).logsumexp(0)
    torch.testing.assert_close(drawn.nodes["level"]["log_prob"] + drawn.nodes["z"]["log_prob"], expected_B)

    posterior_BM = torch.stack(joint, -1).softmax(-1)
    found = model.responsibilities({"level": level_B, "z": z_BLKD})
    torch.testing.assert_close(found["topic"], posterior_BM.unflatten(-1, (3, 2)).sum(-1))
    torch.testing.assert_close(found["sign"], posterior_BM.unflatten(-1, (3, 2)).sum(-2))


def test_samples_are_those_of_the_program(make):
    model = make(Chain)
    with torch.no_grad():
        summed = model.sample_prior(20_000).flatten(1)
        with pyro.plate("sequences", 20_000, dim=-1):
            plain = model.prior().flatten(1)  # the program as it stands, with its discrete sites drawn
    for power in (1, 2):
        error = (summed**power).std(0) / 20_000**0.5
        assert (((summed**power).mean(0) - (plain**power).mean(0)).abs() < 6 * error).all()


def test_responsibilities_are_those_of_the_mixture(make):
    model = make(Topic)
    z_BLKD = torch.randn(4, *model.prior.shape)
    mixture = MixturePrior(model.decoder.thought_shape, components=3)
    mixture.load_state_dict(
        {
            "logits_M": model.prior.logits.detach(),
            "mean_MLKD": model.prior.mean.detach(),
            "log_scale_MLKD": torch.full_like(model.prior.mean, 0.5).log(),
        }
    )
    torch.testing.assert_close(model.responsibilities({"z": z_BLKD})["topic"], mixture.responsibilities(z_BLKD))


@pytest.mark.parametrize("prior", [Topic, pytest.param(Chain, marks=pytest.mark.slow)])
def test_it_is_trained_and_fitted_from_several_starts_sequence_by_sequence(prior, make, tiny_batch):
    model, batch = make(prior), tiny_batch()
    guide = MeanField(model)
    check_model(model, guide)
    assert number_of_starts(model, guide, LocalInference(steps=1)) > 1
    before = [x.detach().clone() for x in model.prior.parameters()]
    DualRateSVI(model, guide, lambda name: {"lr": 0.1}, LocalInference(steps=1)).step(batch)
    assert all((x != y).any() for x, y in zip(model.prior.parameters(), before, strict=True))
    inference = LocalInference(steps=1, rate=0.1, starts=2)
    whole, _ = infer_local(model, guide, batch, inference, keys=RowKeys.of_batch(batch, 1))
    one = batch.select(torch.tensor([1]))
    alone, _ = infer_local(model, guide, one, inference, keys=RowKeys.of_batch(one, 1))
    for name, x in alone.parameters.items():
        torch.testing.assert_close(x[0], whole.parameters[name][1])
    assert set(prior_sites(model, 2)) == {"z"} | ({"level"} if prior is Chain else set())


REFUSED = {
    Direct: r"thoughts depend on topic itself, so that the decoder would have to run once for each of its 3 values",
    Many: rf"site 'topic' has {LIMIT + 1} values, .*{LIMIT} are the most",
    Endless: r"site 'topic' is a Poisson, whose values cannot be listed",
    Forked: r"next site is u or z, by the value of topic",
}


@pytest.mark.parametrize("prior", REFUSED)
def test_what_cannot_be_summed_out_is_refused_in_one_sentence(prior, make):
    with pytest.raises(UsageError, match=REFUSED[prior]) as error:
        make(prior)
    assert "\n" not in str(error.value)
