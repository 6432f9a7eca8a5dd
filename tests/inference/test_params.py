"""Pyro's idea of a parameter: `pyro.param` is learned, saved and loaded, and what is frozen stays frozen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import Amortized, MeanField
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.local import init
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import LatentThoughtModel, LinearGaussianModel
from ltm_pyro.training.check_model import check_model, check_state

INFERENCE = LocalInference(steps=2, rate=0.1)


class Own(PyroModule):
    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)


class Statements(Own):
    """The first idiom of a Pyro user, with a constraint and an initial value that is drawn."""

    def forward(self):
        mean = pyro.param("mean", lambda: torch.randn(self.shape))
        scale = pyro.param("scale", torch.full(self.shape, 2.0), constraint=constraints.positive)
        return pyro.sample("z", dist.Normal(mean, scale).to_event(3))


class Attributes(Own):
    """The same with attributes of a module."""

    def __init__(self, shape):
        super().__init__(shape)
        self.mean = PyroParam(torch.randn(self.shape))
        self.scale = PyroParam(torch.full(self.shape, 2.0), constraints.positive)

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, self.scale).to_event(3))


class Frozen(Own):
    def __init__(self, shape):
        super().__init__(shape)
        self.mean = torch.nn.Parameter(torch.full(self.shape, 0.5), requires_grad=False)
        self.offset = torch.nn.Parameter(torch.zeros(self.shape))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean + self.offset, 1.0).to_event(3))


@pytest.fixture
def make(tiny_decoder):
    def make(prior):
        torch.manual_seed(3)
        decoder = tiny_decoder()
        return LatentThoughtModel(prior(decoder.thought_shape), decoder)

    return make


def rates(name):
    return {"lr": 0.1}


def trained(model, batch, steps=5):
    svi = DualRateSVI(model, MeanField(model), rates, INFERENCE)
    torch.manual_seed(4)
    return [svi.step(batch) for _ in range(steps)]


def test_a_statement_learns_what_an_attribute_learns(make, tiny_batch):
    batch, statements, attributes = tiny_batch(), make(Statements), make(Attributes)
    attributes.load_state_dict(statements.state_dict())
    before = {name: x.clone() for name, x in statements.state_dict().items()}
    assert trained(statements, batch) == pytest.approx(trained(attributes, batch), abs=1e-9)
    torch.testing.assert_close(statements.state_dict(), attributes.state_dict())
    assert not torch.equal(statements.state_dict()["prior.mean_unconstrained"], before["prior.mean_unconstrained"])
    assert (statements.prior.scale > 0).all()


def test_what_a_statement_has_learned_is_in_the_state_dict_and_used_outside_of_inference(make, tiny_batch):
    model, again = make(Statements), make(Statements)
    trained(model, tiny_batch())
    again.load_state_dict(model.state_dict())
    pyro.clear_param_store()
    with torch.no_grad():
        for each in (model, again):
            prior = poutine.trace(each.sample_prior).get_trace(2).nodes["z"]["fn"].base_dist
            torch.testing.assert_close(prior.loc[0], model.prior.mean)
            torch.testing.assert_close(prior.scale[0], model.prior.scale)


def test_stock_pyro_learns_a_statement(make, tiny_batch):
    model, batch = make(Statements), tiny_batch()
    before, q = model.prior.mean.detach().clone(), MeanField(model)
    guide = LocalPosterior(q, init(model, q, batch, INFERENCE))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(batch)
    assert (model.prior.mean - before).abs().min() > 1e-3
    assert "mean" not in pyro.get_param_store()


def test_the_check_before_training_finds_a_gradient_for_every_statement(make):
    model = make(Statements)
    check_model(model, MeanField(model))
    check_state(model, lambda: make(Statements))


class Dotted(Own):
    def forward(self):
        return pyro.sample("z", dist.Normal(pyro.param("my.mean", torch.zeros(self.shape)), 1.0).to_event(3))


class Taken(Own):
    def forward(self):
        return pyro.sample("z", dist.Normal(pyro.param("shape", torch.zeros(self.shape)), 1.0).to_event(3))


@pytest.mark.parametrize(("prior", "name"), [(Dotted, "my.mean"), (Taken, "shape")])
def test_a_statement_that_no_module_can_keep_is_refused(prior, name, make):
    with pytest.raises(UsageError, match=rf"pyro.param '{name}' cannot be learned.*PyroParam"):
        make(prior)


def test_a_statement_of_a_model_that_does_not_adopt_it_is_refused(tiny_decoder):
    class Joint(LinearGaussianModel):
        def __init__(self, prior):
            super().__init__(ThoughtShape(1, 1, 2))
            self.prior, self.decoder = prior, tiny_decoder(layers=1, thoughts=1, thought_width=2)

    model = Joint(Statements(ThoughtShape(1, 1, 2)))
    with pytest.raises(UsageError, match=r"pyro.param .mean. would not be learned in Joint.*PyroParam"):
        check_model(model, MeanField(model))


@pytest.mark.parametrize("outside", [False, True], ids=["trained at once", "after stock Pyro has traced it"])
def test_what_is_frozen_stays_frozen(outside, make, tiny_batch):
    model, batch = make(Frozen), tiny_batch()
    if outside:
        Predictive(model, num_samples=2)(batch)
    check_model(model, MeanField(model))
    trained(model, batch)
    assert not model.prior.mean.requires_grad
    assert (model.prior.mean == 0.5).all()
    assert (model.prior.offset != 0).all()


class Drawn(Own):
    """A PyroSample, of which a Pyro user expects one draw."""

    def __init__(self, shape):
        super().__init__(shape)
        self.mean = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean[..., None, None, None], torch.ones(self.shape)).to_event(3))


def test_a_sample_attribute_is_refused(make):
    with pytest.raises(UsageError, match=r"Drawn.mean .* is a PyroSample.*GlobalLatent"):
        make(Drawn)


class Stateful(Own):
    def __init__(self, shape):
        super().__init__(shape)
        self.mean = torch.randn(self.shape)  # neither a parameter nor a buffer

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


def test_state_outside_of_the_state_dict_is_refused(make, tiny_decoder):
    model, decoder = make(Stateful), tiny_decoder()
    with pytest.raises(UsageError, match=r"Site 'z' .*test_params.py:\d+. is not determined by .*register_buffer"):
        check_state(model, lambda: LatentThoughtModel(Stateful(decoder.thought_shape), decoder))


class GuideOfStatements(MeanField):
    def __call__(self, batch, local):
        pyro.param("factor", torch.ones(()))
        return super().__call__(batch, local)


def test_a_statement_in_a_guide_is_refused(make, tiny_batch):
    model, batch = make(Attributes), tiny_batch()
    guide = GuideOfStatements(model)
    for door in (lambda: check_model(model, guide), lambda: DualRateSVI(model, guide, rates, INFERENCE).step(batch)):
        with pytest.raises(UsageError, match=r"guide's pyro.param 'factor' would not be learned.*torch.nn.Parameter"):
            door()


def test_a_guide_with_parameters_of_its_own_is_not(make, tiny_batch):
    model, batch = make(Attributes), tiny_batch()
    guide = Amortized(model, layers=1, width=8, heads=1)
    with torch.no_grad():
        elbo_terms(model, guide, batch, init(model, guide, batch, INFERENCE).parameters)
