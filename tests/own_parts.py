"""Priors and guides as long-time Pyro users write them, in a file of their own; every name tells the idiom.

`REFUSED` are those that cannot be what their author means, with the words of the refusal. The others learn, are saved,
loaded, evaluated, read and written with.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import biject_to

from ltm_pyro import Batch, GlobalLatent, Guide, Init, Model, ThoughtShape
from ltm_pyro.contracts import sequence_plate
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.latent_sites import prior_moments, prior_sites


class Own(PyroModule):
    """What all of them share: the shape, and a learned mean."""

    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.mean = torch.nn.Parameter(0.1 * torch.randn(self.shape))


class Function(Own):
    """Parameters by pyro.param, the first idiom of a Pyro user."""

    def __init__(self, shape: ThoughtShape) -> None:
        PyroModule.__init__(self)
        self.shape = tuple(shape)

    def forward(self):
        loc = pyro.param("loc", torch.zeros(self.shape))
        scale = pyro.param("scale", torch.ones(self.shape), constraint=constraints.positive)
        return pyro.sample("z", dist.Normal(loc, scale).to_event(3))


class Params(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.scale = PyroParam(torch.ones(self.shape), constraints.positive, event_dim=3)

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, self.scale).to_event(3))


class Frozen(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.fixed = torch.nn.Parameter(torch.ones(self.shape), requires_grad=False)

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, self.fixed).to_event(3))


class NotCentred(Own):
    def forward(self):
        unit = pyro.sample("unit", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))
        return self.mean + unit.tanh()


class Laplacian(Own):
    def forward(self):
        return pyro.sample("z", dist.Laplace(self.mean, 1.0).to_event(3))


class Student(Own):
    def forward(self):
        return pyro.sample("z", dist.StudentT(3.0, self.mean, 1.0).to_event(3))


class HeavyTails(Own):
    def forward(self):
        return pyro.sample("z", dist.Cauchy(self.mean, 0.5).to_event(3))


class Horseshoe(Own):
    """Centred, with a scale of infinite mean for each coordinate of each sequence."""

    def forward(self):
        scale = pyro.sample("scale", dist.HalfCauchy(torch.full(self.shape, 0.5)).to_event(3))
        return pyro.sample("z", dist.Normal(self.mean, scale).to_event(3))


class HorseshoeNotCentred(Own):
    def forward(self):
        scale = pyro.sample("scale", dist.HalfCauchy(torch.full(self.shape, 0.5)).to_event(3))
        return self.mean + scale * pyro.sample("unit", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))


class Positive(Own):
    def forward(self):
        return pyro.sample("z", dist.Gamma(2.0, self.mean.exp()).to_event(3))


class Bounded(Own):
    def forward(self):
        return 4 * pyro.sample("z", dist.Beta(self.mean.exp(), torch.ones(self.shape)).to_event(3)) - 2


class Simplex(Own):
    def forward(self):
        return 2 * pyro.sample("z", dist.Dirichlet(self.mean.exp()).to_event(2))


class Correlated(Own):
    def forward(self):
        factor = torch.eye(self.shape[-1]) + 0.2 * torch.ones(self.shape[-1], self.shape[-1]).tril(-1)
        return pyro.sample("z", dist.MultivariateNormal(self.mean, scale_tril=factor).to_event(2))


class SpikeAndSlab(Own):
    def forward(self):
        choice = dist.Categorical(logits=torch.tensor([0.0, 1.5]).expand(*self.shape, 2))
        scales = torch.tensor([1.0, 0.1]).expand(*self.shape, 2)
        parts = dist.Normal(self.mean.unsqueeze(-1).expand(*self.shape, 2), scales)
        return pyro.sample("z", dist.MixtureSameFamily(choice, parts).to_event(3))


class TwoModes(Own):
    def forward(self):
        choice = dist.Categorical(torch.ones(2))
        parts = dist.Normal(torch.stack([self.mean - 1.5, self.mean + 1.5]), 0.5).to_event(3)
        return pyro.sample("z", dist.MixtureSameFamily(choice, parts))


class Hierarchy(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.read = PyroModule[torch.nn.Linear](3, self.mean.numel())

    def forward(self):
        topic = pyro.sample("topic", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return pyro.sample("z", dist.Normal(self.mean + self.read(topic).unflatten(-1, self.shape), 0.5).to_event(3))


class Loop(Own):
    """A chain of sites, one a layer, with names of its own."""

    def forward(self):
        layers = [pyro.sample("first", dist.Normal(self.mean[0], 1.0).to_event(2))]
        for layer in range(1, self.shape[0]):
            layers.append(
                pyro.sample(f"layer_{layer}", dist.Normal(0.5 * layers[-1] + self.mean[layer], 1.0).to_event(2))
            )
        return torch.stack(layers, -3)


class Network(Own):
    """A generator: noise through a plain torch network, which is no PyroModule."""

    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        width = self.mean.numel()
        self.net = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Tanh(), torch.nn.Linear(8, width))

    def forward(self):
        noise = pyro.sample("noise", dist.Normal(torch.zeros(self.mean.numel()), 1.0).to_event(1))
        return self.mean + self.net(noise).unflatten(-1, self.shape)


class Global(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.scale = GlobalLatent("scale", dist.HalfNormal, torch.ones(self.shape), init=torch.ones(self.shape))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, self.scale()).to_event(3))


class Deterministic(Own):
    def forward(self):
        unit = pyro.sample("unit", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))
        return pyro.deterministic("thought", self.mean + 0.5 * unit, event_dim=3)


class Transformed(Own):
    def forward(self):
        base = dist.Normal(self.mean, 0.5)
        return pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.SoftplusTransform()]).to_event(3))


class Sample(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.level = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean + self.level[..., None, None, None], 1.0).to_event(3))


class Outside(Own):
    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__(shape)
        self.level = torch.randn(self.shape)

    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean + self.level, 1.0).to_event(3))


class Topic(Own):
    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(torch.ones(3)))
        return pyro.sample("z", dist.Normal(self.mean + topic[..., None, None, None], 1.0).to_event(3))


class SummedTopic(Own):
    def forward(self):
        topic = pyro.sample("topic", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        return pyro.sample("z", dist.Normal(self.mean + topic[..., None, None, None], 1.0).to_event(3))


class Dotted(Own):
    def forward(self):
        return pyro.sample("z.all", dist.Normal(self.mean, 1.0).to_event(3))


class Coupled(Own):
    def forward(self):
        z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))
        return z - z.mean(0)


class Beside(Own):
    def forward(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3)) + 0.1 * torch.randn(self.shape)


class Scaled(Own):
    def forward(self):
        with pyro.poutine.scale(scale=0.1):
            return pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(3))


REFUSED = {
    "Sample": "PyroSample",
    "Outside": "state_dict",
    "Topic": "discrete",
    "Dotted": "has '.' in its name",
    "Coupled": "couples sequences",
    "Beside": "random numbers beside its sites",
    "Scaled": "is scaled by",
}
PRIORS = [
    cls.__name__
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Own) and cls is not Own and cls.__name__ not in REFUSED
]


class Located(Guide):
    """A family by location and scale, on unconstrained coordinates; a subclass says which."""

    family = staticmethod(dist.Normal)

    def __init__(self, model: Model) -> None:
        self.bijections = {name: biject_to(fn.support) for name, fn in prior_sites(model, 1).items()}

    def init(self, sites, init: Init):
        local = {}
        for name in self.bijections:
            mean, variance = prior_moments(sites[name])
            local |= {f"{name}_loc": mean, f"{name}_log_scale": (variance.log() + init.log_var) / 2}
        return local

    def __call__(self, batch: Batch, local):
        with pyro.plate("sequences", batch.size, dim=-1):
            for name, bijection in self.bijections.items():
                loc, scale = local[f"{name}_loc"], local[f"{name}_log_scale"].exp()
                q = self.family(loc, scale).to_event(loc.dim() - 1)
                pyro.sample(name, dist.TransformedDistribution(q, bijection))


class LogisticGuide(Located):
    family = staticmethod(dist.Logistic)


class LaplaceGuide(Located):
    family = staticmethod(dist.Laplace)


class StudentGuide(Located):
    @staticmethod
    def family(loc, scale):
        return dist.StudentT(5.0, loc, scale)


class GumbelGuide(Located):
    family = staticmethod(dist.Gumbel)


class Factor(MeanField, torch.nn.Module):
    """A guide with a parameter of all sequences: a factor on every scale, which the slow step trains."""

    def __init__(self, model: Model) -> None:
        torch.nn.Module.__init__(self)
        MeanField.__init__(self, model)
        self.log_factor = torch.nn.Parameter(torch.zeros(()))

    def __call__(self, batch: Batch, local):
        changed = {name: x + self.log_factor if name.endswith("_log_var") else x for name, x in local.items()}
        return super().__call__(batch, changed)


class Finished(MeanField):
    """A guide that does something after the fast steps: it halves its variances."""

    def finalize(self, model, batch, local, steps, rate):
        return {name: x - 0.7 if name.endswith("_log_var") else x for name, x in local.items()}


class Scalar(MeanField):
    """One variance for all coordinates of a site."""

    def init(self, sites, init: Init):
        local = super().init(sites, init)
        return {n: x.flatten(1).mean(1) if n.endswith("_log_var") else x for n, x in local.items()}

    def posterior(self, name, local):
        loc, log_var = local[f"{name}_loc"], local[f"{name}_log_var"]
        spread = log_var.view(-1, *[1] * (loc.dim() - 1)).expand_as(loc)
        return super().posterior(name, {f"{name}_loc": loc, f"{name}_log_var": spread})


class WithPlate(MeanField):
    def __call__(self, batch: Batch, local):
        with sequence_plate(batch.size):
            return {name: pyro.sample(name, self.posterior(name, local)) for name in reversed(list(self.sites))}


class Statement(MeanField):
    def __call__(self, batch: Batch, local):
        pyro.param("factor", torch.ones(()))
        return super().__call__(batch, local)


class NoPlate(MeanField):
    def __call__(self, batch: Batch, local):
        return {name: pyro.sample(name, self.posterior(name, local)) for name in self.sites}


class Misspelled(MeanField):
    def __call__(self, batch: Batch, local):
        return pyro.sample("zz", dist.Normal(next(iter(local.values())), 1.0).to_event(3))


class Mixture(Located):
    """Without reparameterised draws."""

    def __call__(self, batch: Batch, local):
        with pyro.plate("sequences", batch.size, dim=-1):
            for name in self.bijections:
                loc, scale = local[f"{name}_loc"], local[f"{name}_log_scale"].exp()
                parts = dist.Normal(torch.stack([loc, loc + 1], 1), scale[:, None]).to_event(loc.dim() - 1)
                pyro.sample(name, dist.MixtureSameFamily(dist.Categorical(torch.ones(len(loc), 2)), parts))


REFUSED_GUIDES = {
    "Statement": "pyro.param 'factor' would not be learned",
    "NoPlate": "outside the plate",
    "Misspelled": "outside the plate of sequences",
    "Mixture": "without reparameterised samples",
}
GUIDES = ["LogisticGuide", "LaplaceGuide", "StudentGuide", "GumbelGuide", "Factor", "Finished", "Scalar", "WithPlate"]
