"""The checks before training: every error names the site and the source line to change."""

import inspect
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import constraints

from ltm_pyro.contracts import Batch, ThoughtShape, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import (
    Amortized,
    BlockCovariance,
    FlowGuide,
    FullCovariance,
    Langevin,
    Laplace,
    LowRank,
    MeanField,
    Point,
)
from ltm_pyro.inference.check_prior import check_prior
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.plate_diagram import plate_diagram
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import FlowPrior, LatentThoughtModel, LinearGaussianModel
from ltm_pyro.training.check_model import check_model


class Valid(PyroModule):
    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)
        self.mean = torch.nn.Parameter(torch.zeros(self.shape))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class Flattened(Valid):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3)).flatten(-2)


class NoEvent(Valid):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean[..., :1], 1.0))


class NoEventFullShape(Valid):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0))


class Discrete(Valid):
    def forward(self):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        return pyro.sample("z", dist.Normal(self.mean + kind[..., None, None, None], 1.0).to_event(3))


class Sphere(Valid):
    def forward(self):
        return pyro.sample("z", OnSphere(self.mean, 1.0).to_event(3))


class OnSphere(dist.Normal):
    support = constraints.Constraint()


class NoParticleAxis(Valid):
    def forward(self):
        z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))
        return z.view(z.shape[0], *self.shape) if z.dim() == 4 else z[0]


class ExtraPlate(Valid):
    def forward(self):
        with pyro.plate("mine", 3):
            return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class Broken(Valid):
    def forward(self):
        return self.nothing


class Dotted(Valid):
    def forward(self):
        return pyro.sample("z.a", dist.Normal(self.mean, 1.0).to_event(3))


class Slashed(Valid):
    def forward(self):
        return pyro.sample("z/a", dist.Normal(self.mean, 1.0).to_event(3))


class Sometimes(Valid):
    def forward(self):
        if torch.rand(()) < 0.5:
            pyro.sample("u", dist.Normal(self.mean, 1.0).to_event(3))
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class SamePlate(Valid):
    def forward(self):
        with pyro.plate("mine", 3, dim=-1):
            return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


class Coupled(Valid):
    def forward(self):
        z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))
        return z - z.mean(0)


class CoupledDensity(Valid):
    def forward(self):
        u = pyro.sample("u", dist.Normal(self.mean, 1.0).to_event(3))
        return pyro.sample("z", dist.Normal(u.sum(0), 1.0).expand(u.shape).to_event(3))


class Beside(Valid):
    def forward(self):
        z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))
        return z + 0.1 * torch.randn(z.shape)


class UnusedParameter(Valid):
    def forward(self):
        return pyro.sample("z", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))


class InfiniteMean(Valid):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean + torch.inf, 1.0).to_event(3))


def line(cls, word):
    """``file:line`` of the first line of the class's forward that contains ``word``."""
    lines, first = inspect.getsourcelines(cls.forward)
    return f"{__file__}:{first + next(i for i, text in enumerate(lines) if word in text)}"


@pytest.fixture
def make_model(tiny_decoder):
    def make(prior):
        decoder = tiny_decoder()
        return LatentThoughtModel(prior(decoder.thought_shape), decoder)

    return make


FAULTS = {
    Flattened: (r"Flattened returns \(5, 2, 24\)", "return"),
    NoEvent: (r"Site 'z' .* has batch shape .* add .to_event", '"z"'),
    NoEventFullShape: (r"NoEventFullShape fails at .*Shape mismatch inside plate.* add .to_event", '"z"'),
    ExtraPlate: (r"The prior opens a plate 'mine'.* leave it out", "pyro.plate"),
    Discrete: (r"Prior site 'kind' is discrete.*marginalise", "pyro.sample"),
    Sphere: (r"No guide reaches the support of prior site 'z'", "pyro.sample"),
    NoParticleAxis: (r"NoParticleAxis returns .*\(S, B, L, K, D\) = \(2, 7", "return"),
    Broken: (r"Broken fails at .*AttributeError", "self.nothing"),
    Dotted: (r"Site 'z.a' .* has '\.' in its name.* write 'z_a'", '"z.a"'),
    Slashed: (r"Site 'z/a' .* has '/' in its name.* write 'z_a'", '"z/a"'),
    Sometimes: (r"Site 'u' .* is sampled in some calls and not in others", '"u"'),
    SamePlate: (r"SamePlate fails at .*collide at dim=-1: leave the plate out", "pyro.plate"),
    Coupled: (r"Coupled couples sequences", "return"),
    CoupledDensity: (r"CoupledDensity couples sequences", "return"),
    Beside: (r"Beside draws random numbers beside its sites", "torch.rand"),
}


@pytest.mark.parametrize("prior", FAULTS)
def test_the_error_names_the_fault_and_its_line(prior, make_model):
    message, word = FAULTS[prior]
    with pytest.raises(UsageError, match=message) as error:
        make_model(prior)
    assert line(prior, word) in str(error.value)
    assert "\n" not in str(error.value)


NOT_TRAINABLE = [(UnusedParameter, "does not reach the parameter 'prior.mean'"), (InfiniteMean, "kl is")]


@pytest.mark.parametrize(("prior", "message"), NOT_TRAINABLE)
def test_a_prior_that_cannot_be_trained_is_refused(prior, message, make_model):
    model = make_model(prior)
    check_prior(model)
    with pytest.raises(UsageError, match=message) as error:
        check_model(model, MeanField(model))
    assert __file__ in str(error.value)


class NoStart(MeanField):
    def init(self, sites, init):
        super().init(sites, init)


class OneTensor(MeanField):
    def init(self, sites, init):
        return super().init(sites, init)["z_loc"]


class Numbers(MeanField):
    def init(self, sites, init):
        return super().init(sites, init) | {"z_loc": 0.0}


class NoPlate(MeanField):
    def __call__(self, batch, local):
        return pyro.sample("z", dist.Normal(local["z_loc"], 1.0).to_event(3))


class FlatPlate(MeanField):
    def __call__(self, batch, local):
        with pyro.plate("rows", batch.size, dim=-1):
            return pyro.sample("z", dist.Normal(local["z_loc"], 1.0).to_event(3))


class NoEvents(MeanField):
    def __call__(self, batch, local):
        return pyro.sample("z", dist.Normal(local["z_loc"], 1.0))


class BrokenGuide(MeanField):
    def __call__(self, batch, local):
        return pyro.sample("z", dist.Normal(local["z_mean"], 1.0).to_event(3))


FAULTY_GUIDES = {
    NoStart: r"NoStart.init returns NoneType: return the local parameters as a dictionary",
    OneTensor: r"OneTensor.init returns Tensor: return",
    Numbers: r"Numbers.init returns a dictionary with Tensor, float: return",
    NoPlate: r"NoPlate samples 'z' .*test_check.py:\d+. outside the plate of sequences.*sequence_plate\(batch.size\)",
    FlatPlate: r"FlatPlate samples 'z' .*test_check.py:\d+. outside the plate",
    NoEvents: r"NoEvents samples 'z' .*, or with batch shape \(2, 2, 3, 8\) for 2 sequences: .* .to_event",
    BrokenGuide: r"BrokenGuide fails at .*test_check.py:\d+: KeyError, 'z_mean'",
}


@pytest.mark.parametrize("guide", FAULTY_GUIDES)
def test_a_guide_that_cannot_be_fitted_is_refused_before_training(guide, tiny_model):
    model = tiny_model()
    with pytest.raises(UsageError, match=FAULTY_GUIDES[guide]) as error:
        check_model(model, guide(model))
    assert "\n" not in str(error.value)
    assert "mean_field.py" not in str(error.value)


@pytest.mark.parametrize("guide", [FullCovariance, BlockCovariance, FlowGuide, Amortized])
def test_a_guide_that_needs_thoughts_says_so(guide, tiny_model):
    with pytest.raises(UsageError, match=rf"{guide.__name__} needs thoughts, but the site 'z' has none \(K = 0\)"):
        guide(tiny_model(thoughts=0))


@pytest.mark.parametrize("guide", [MeanField, LowRank, Point, Laplace, Langevin])
def test_the_other_guides_need_none(guide, tiny_model, tiny_batch):
    model = tiny_model(thoughts=0)
    check_model(model, guide(model))
    evaluate(model, guide(model), [tiny_batch()], LocalInference(steps=1), samples=2)


def test_a_valid_prior_passes(make_model):
    model = make_model(Valid)
    check_prior(model)
    check_model(model, MeanField(model))


def test_the_error_of_an_interactively_defined_prior_names_its_class(make_model):
    names = {"Valid": Valid, "pyro": pyro, "__name__": "__nowhere__"}
    exec("class Typed(Valid):\n    def forward(self):\n        return pyro.nothing", names)
    with pytest.raises(UsageError, match=r"Typed fails at .*: AttributeError"):
        make_model(names["Typed"])


def test_a_batch_on_another_device_and_wrong_token_shapes_are_refused(tiny_model, tiny_batch):
    model = tiny_model()
    with pytest.raises(UsageError, match=r'The batch is on meta, but the model on cpu: .* batch.to\("cpu"\)'):
        model.prepare(tiny_batch().to("meta"))
    unchecked = inspect.unwrap(make_batch)  # without beartype, which users do not have
    tokens_BT, lengths_B = torch.ones(3, 4, dtype=torch.long), torch.full((3,), 4)
    for tokens, lengths in ((tokens_BT, lengths_B[:2]), (tokens_BT[0], lengths_B), (tokens_BT * 1.0, lengths_B)):
        with pytest.raises(UsageError, match="whole-number tokens of shape"):
            unchecked(tokens, lengths, start_token=0)


def rates(name):
    return {"lr": 0.1}


@pytest.mark.parametrize("token", [11, -1, 10**6])
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "the last, which is no input"])
@pytest.mark.parametrize("kind", [LatentThoughtModel, LinearGaussianModel])
def test_a_token_beyond_the_vocabulary_is_refused_at_every_door(tiny_model, tiny_batch, token, last, kind):
    model = tiny_model() if kind is LatentThoughtModel else LinearGaussianModel(ThoughtShape(1, 1, 2), 7, vocabulary=11)
    guide, inference, batch = MeanField(model), LocalInference(steps=1), tiny_batch()
    tokens_BT = batch.targets_BT.clone()
    tokens_BT[0, -1 if last else 2] = token
    wrong = make_batch(tokens_BT, batch.tokens_B, start_token=0)
    doors = {
        "prepare": lambda x: model.prepare(x),
        "infer_local": lambda x: infer_local(model, guide, x, inference),
        "training_loss": lambda x: training_loss(model, guide, x, inference),
        "evaluate": lambda x: evaluate(model, guide, [x], inference, samples=2),
    }
    if kind is LatentThoughtModel:  # the other has no parameters to train, and a grid of values
        doors |= {"a call": model, "step": lambda x: DualRateSVI(model, guide, rates, inference).step(x)}
    for door in doors.values():
        door(batch)
        with pytest.raises(UsageError, match=rf"A batch has the token {token}, .* are 0 to 10: .* tokenizer"):
            door(wrong)


def test_tokens_that_were_looked_at_on_the_cpu_are_not_asked_for_on_a_device():
    """A batch on a device that has no values: what asks it for one raises an error of torch's own."""
    batch = make_batch(torch.tensor([[1, 9, 3]]), torch.tensor([3]), start_token=0)
    known = (batch.below, batch.select(torch.tensor([0])).below, batch.crop(0, 2).below, batch.observed.below)
    assert known == (10, 10, 10, 10)
    assert make_batch(torch.tensor([[1, -2, 3]]), torch.tensor([3]), start_token=0).below is None
    with FakeTensorMode():
        there = Batch._make(
            torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x for x in batch
        )
        there.check_tokens(10)
        for unknown, vocabulary in ((there, 9), (there._replace(below=None), 10)):
            with pytest.raises(DataDependentOutputException):
                unknown.check_tokens(vocabulary)


def test_tokens_are_checked_once_a_batch_and_not_at_every_fast_step(tiny_model, tiny_batch, monkeypatch):
    model, seen, check = tiny_model(), [], Batch.check_tokens
    monkeypatch.setattr(Batch, "check_tokens", lambda self, size: seen.append(size) or check(self, size))
    infer_local(model, MeanField(model), tiny_batch(), LocalInference(steps=5))
    assert seen == [11]


def test_local_parameters_without_a_sequence_axis_are_refused(tiny_model, tiny_batch):
    class Unbatched(MeanField):
        def init(self, sites, init):
            return {name: x[0] for name, x in super().init(sites, init).items()}

    model = tiny_model()
    with pytest.raises(UsageError, match=r"Unbatched.init gives .*'z_loc': \(2, 3, 8\).* the 3 sequences"):
        infer_local(model, Unbatched(model), tiny_batch(), LocalInference(steps=1))


def test_a_missing_optional_dependency_is_named(make_model, tiny_decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(UsageError, match=r"FlowPrior needs zuko: pip install 'ltm-pyro\[flows\]'"):
        FlowPrior(tiny_decoder().thought_shape)
    with pytest.raises(UsageError, match="FlowGuide needs zuko"):
        FlowGuide(make_model(Valid))


class Unknown(MeanField):
    def __call__(self, batch, local):
        return undefined


class UnknownLater(MeanField):
    def finalize(self, model, batch, local, steps, rate):
        return undefined


@pytest.mark.parametrize("guide", [Unknown, UnknownLater])
def test_an_error_in_a_guide_is_told_as_the_guides(guide, make_model):
    """In whatever step of inference it appears, and although the prior is defined in the same file."""
    model = make_model(Valid)
    with pytest.raises(UsageError, match=rf"{guide.__name__} fails at .*test_check.py:\d+: NameError"):
        check_model(model, guide(model))


FAMILIES = {
    "Laplace": lambda x: dist.Laplace(x, 1.0),
    "Cauchy": lambda x: dist.Cauchy(x, 1.0),
    "HalfCauchy": lambda x: dist.HalfCauchy(x.exp()),
    "Exponential": lambda x: dist.Exponential(x.exp()),
    "Pareto": lambda x: dist.Pareto(x.exp(), 3.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_diagram_of_a_site_that_depends_on_another(family, make_model, tiny_batch):
    class Below(Valid):
        def forward(self):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            return pyro.sample("z", FAMILIES[family](self.mean + u[..., None, None, None]).to_event(3))

    drawn = plate_diagram(make_model(Below), tiny_batch())
    assert f">{family}<" in drawn
    assert drawn.count("<line") == 2  # from u to z, and from z to the tokens
