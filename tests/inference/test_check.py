"""The check before training: every failure names the site and the line to change."""

import inspect
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.distributions import constraints

from ltm_pyro.contracts import make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FlowGuide, MeanField
from ltm_pyro.inference.check_prior import check_prior
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import FlowPrior, LatentThoughtModel
from ltm_pyro.training.check_model import check_model


class Sound(PyroModule):
    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)
        self.mean = torch.nn.Parameter(torch.zeros(self.shape))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class Flat(Sound):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3)).flatten(-2)


class NoEvent(Sound):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean[..., :1], 1.0))


class NoEventEither(Sound):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0))


class Discrete(Sound):
    def forward(self):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        return pyro.sample("z", dist.Normal(self.mean + kind[..., None, None, None], 1.0).to_event(3))


class Sphere(Sound):
    def forward(self):
        return pyro.sample("z", OnSphere(self.mean, 1.0).to_event(3))


class OnSphere(dist.Normal):
    support = constraints.Constraint()


class OneBatch(Sound):
    def forward(self):
        z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))
        return z.view(z.shape[0], *self.shape) if z.dim() == 4 else z[0]


class OwnPlate(Sound):
    def forward(self):
        with pyro.plate("mine", 3):
            return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class Broken(Sound):
    def forward(self):
        return self.nothing


class Deaf(Sound):
    def forward(self):
        return pyro.sample("z", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))


class Endless(Sound):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean + torch.inf, 1.0).to_event(3))


def line(cls, word):
    """Where ``word`` stands in the class."""
    lines, first = inspect.getsourcelines(cls.forward)
    return f"{__file__}:{first + next(i for i, text in enumerate(lines) if word in text)}"


@pytest.fixture
def joined(tiny_decoder):
    def make(prior):
        decoder = tiny_decoder()
        return LatentThoughtModel(prior(decoder.thought_shape), decoder)

    return make


FAULTS = {
    Flat: (r"Flat returns \(5, 2, 24\)", "return"),
    NoEvent: (r"Site 'z' .* has batch shape .* add .to_event", '"z"'),
    NoEventEither: (r"NoEventEither fails at .*Shape mismatch inside plate.* add .to_event", '"z"'),
    OwnPlate: (r"The prior opens a plate 'mine'.* leave it out", "pyro.plate"),
    Discrete: (r"Prior site 'kind' is discrete.*marginalise", "pyro.sample"),
    Sphere: (r"No guide reaches the support of prior site 'z'", "pyro.sample"),
    OneBatch: (r"OneBatch returns .*\(S, B, L, K, D\) = \(2, 7", "return"),
    Broken: (r"Broken fails at .*AttributeError", "self.nothing"),
}


@pytest.mark.parametrize("prior", FAULTS)
def test_every_fault_of_a_prior_is_named_with_its_line(prior, joined):
    message, word = FAULTS[prior]
    with pytest.raises(UsageError, match=message) as found:
        joined(prior)
    assert line(prior, word) in str(found.value)
    assert "\n" not in str(found.value)


NOT_LEARNED = [(Deaf, "does not reach the parameter 'prior.mean'"), (Endless, "kl is")]


@pytest.mark.parametrize(("prior", "message"), NOT_LEARNED)
def test_what_cannot_be_learned_is_named(prior, message, joined):
    model = joined(prior)
    check_prior(model)
    with pytest.raises(UsageError, match=message) as found:
        check_model(model, MeanField(model))
    assert __file__ in str(found.value)


def test_a_sound_prior_passes(joined):
    model = joined(Sound)
    check_prior(model)
    check_model(model, MeanField(model))


def test_a_prior_written_at_a_prompt_is_named_by_its_class(joined):
    names = {"Sound": Sound, "pyro": pyro, "__name__": "__nowhere__"}
    exec("class Typed(Sound):\n    def forward(self):\n        return pyro.nothing", names)
    with pytest.raises(UsageError, match=r"Typed fails at .*: AttributeError"):
        joined(names["Typed"])


def test_a_batch_elsewhere_and_tokens_of_another_shape_are_one_sentence(tiny_model, tiny_batch):
    model = tiny_model()
    with pytest.raises(UsageError, match=r'The batch is on meta, but the model on cpu: .* batch.to\("cpu"\)'):
        model.prepare(tiny_batch().to("meta"))
    unchecked = inspect.unwrap(make_batch)  # not by beartype, which users do not have
    tokens_BT, lengths_B = torch.ones(3, 4, dtype=torch.long), torch.full((3,), 4)
    for tokens, lengths in ((tokens_BT, lengths_B[:2]), (tokens_BT[0], lengths_B), (tokens_BT * 1.0, lengths_B)):
        with pytest.raises(UsageError, match="whole-number tokens of shape"):
            unchecked(tokens, lengths, start_token=0)


def test_local_parameters_without_an_axis_of_sequences_are_named(tiny_model, tiny_batch):
    class Bare(MeanField):
        def init(self, sites, start):
            return {name: x[0] for name, x in super().init(sites, start).items()}

    model = tiny_model()
    with pytest.raises(UsageError, match=r"Bare.init gives .*'z_loc': \(2, 3, 8\).* the 3 sequences"):
        infer_local(model, Bare(model), tiny_batch(), LocalInference(steps=1))


def test_a_missing_extra_is_named(joined, tiny_decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(UsageError, match=r"FlowPrior needs zuko: pip install 'ltm-pyro\[flows\]'"):
        FlowPrior(tiny_decoder().thought_shape)
    with pytest.raises(UsageError, match="FlowGuide needs zuko"):
        FlowGuide(joined(Sound))
