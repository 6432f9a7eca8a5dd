"""Programs that are no density, as priors, and a guide without gradients, with what is said of them.

A user's file is a copy of this one in which `Mine` and `MyGuide` are others.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule

from ltm_pyro.guides import MeanField


class Program(PyroModule):
    """A prior that runs a function of its shape."""

    def __init__(self, shape, program):
        super().__init__()
        self.shape, self.program = shape, program
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self):
        return self.program(self)


def normal(self):
    return pyro.sample("z", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))


def learned_scale(self):
    return pyro.sample("z", dist.Normal(torch.zeros(self.shape), self.weight).to_event(3))


def scaled(self):
    with poutine.scale(scale=0.01):
        return normal(self)


def masked(self):
    with poutine.mask(mask=torch.tensor(False)):
        return normal(self)


def masked_distribution(self):
    return pyro.sample("z", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3).mask(False))


def observed(self):
    pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=torch.tensor(3.0))
    return normal(self)


def periodic(self):
    return pyro.sample("z", dist.VonMises(torch.zeros(self.shape), 4.0).to_event(3))


def turned(self):
    angles = dist.VonMises(torch.zeros(self.shape), 4.0)
    return pyro.sample("z", dist.TransformedDistribution(angles, [dist.transforms.AffineTransform(0, 1)]).to_event(3))


def angles_of_two_kinds(self):
    kinds = dist.Categorical(logits=torch.zeros(*self.shape, 2))
    return pyro.sample("z", dist.MixtureSameFamily(kinds, dist.VonMises(torch.zeros(*self.shape, 2), 4.0)).to_event(3))


def factor(self):
    z = normal(self)
    pyro.factor("f", 500.0 - z.flatten(-3).square().sum(-1) / 2)  # e^500 · N(0, 1/2), up to a power of two
    return z


def learned_factor(self):
    z = normal(self)
    pyro.factor("f", -self.weight * z.flatten(-3).square().sum(-1))
    return z


REFUSED = {
    scaled: r"Prior site 'z' is scaled by 0.01 \(poutine.scale\)",
    masked: "Prior site 'z' is masked",
    masked_distribution: "Prior site 'z' is masked",
    observed: r"Prior site 'y' has an observed value \(obs=\)",
    periodic: "Prior site 'z' is a VonMises, whose values are angles",
    turned: "Prior site 'z' is a VonMises, whose values are angles",
    angles_of_two_kinds: "Prior site 'z' is a VonMises, whose values are angles",
}


class MixtureGuide(MeanField):
    """q is a mixture of two normals as torch has it: it can be sampled, but not differentiated through."""

    def posterior(self, name, local):
        loc = local[f"{name}_loc"]
        both = torch.stack([loc, loc + 1], dim=1)
        scale = (local[f"{name}_log_var"] / 2).exp()[:, None]
        weights = dist.Categorical(logits=torch.zeros(len(loc), 2))
        return dist.MixtureSameFamily(weights, dist.Normal(both, scale).to_event(3))


class Mine(Program):
    """What a user has: a prior for recipes."""

    def __init__(self, shape):
        super().__init__(shape, learned_scale)


class MyGuide(MeanField):
    """And a guide."""
