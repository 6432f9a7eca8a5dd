"""The base class of Gaussian-like guides: a density over unconstrained coordinates, mapped to each site's support."""

from abc import abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    register_kl,
    transforms,
)

from ltm_pyro.contracts import Batch, Guide, Init, LocalParameters, Model, sequence_plate
from ltm_pyro.inference.latent_sites import (
    Sites,
    bijections,
    coordinate_shape,
    prior_moments,
    prior_sites,
    unconstrained,
)


class UnconstrainedGuide(Guide):
    r"""A density over each site's unconstrained coordinates; sites are independent of each other.

    A subclass defines how q's scale is initialised (`init_scale`), q itself (`base_distribution`) and, if the
    coordinates of a site are not one vector, their shape (`coordinate_shape`). The local parameter ``{site}_loc`` is
    the location, (B, *coordinate_shape).

    Args:
        model: whose latent sites q covers; it is traced once and not stored.
    """

    def __init__(self, model: Model) -> None:
        self.sites = {
            name: (None if unconstrained(fn) else bijection, coordinate_shape(fn, bijection))
            for name, (fn, bijection) in bijections(prior_sites(model, 1)).items()
        }

    def coordinate_shape(self, shape: Size) -> Size:
        """The shape of one sequence's coordinates in q, for a site of event shape ``shape``: one vector of all N."""
        return Size([shape.numel()])

    @abstractmethod
    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """The local parameters other than the location, for the variance of each coordinate, (B, *coordinate_shape)."""

    @abstractmethod
    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """q of the coordinates: batch shape (B,), event shape `coordinate_shape`."""

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """The location at the prior's mean plus jitter; the variance is the prior's times exp(``init.log_var``)."""
        local = {}
        for name, (_, shape) in self.sites.items():
            mean, variance = (x.reshape(len(x), *self.coordinate_shape(shape)) for x in prior_moments(sites[name]))
            local[f"{name}_loc"] = mean + init.jitter * variance.sqrt() * torch.randn_like(mean)
            local |= self.init_scale(name, variance * torch.tensor(init.log_var).exp())
        return local

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site from q with reparameterised gradients."""
        with sequence_plate(batch.size):
            return {name: pyro.sample(name, self.posterior(name, local)) for name in self.sites}

    def posterior(self, name: str, local: LocalParameters) -> Any:
        """q of one site on its support; batch shape (B,)."""
        return self.on_support(name, self.base_distribution(name, local))

    def on_support(self, name: str, base: Any) -> Any:
        """A distribution of a site's coordinates, mapped to the site's support."""
        bijection, shape = self.sites[name]
        reshape = transforms.ReshapeTransform(self.coordinate_shape(shape), shape)
        if bijection is None:
            return Reshaped(base, [reshape])
        return dist.TransformedDistribution(base, [reshape, bijection])


class Reshaped(dist.TransformedDistribution):
    """A distribution with a reshaped event that, unlike `TransformedDistribution`, has a mean and a variance."""

    @property
    def mean(self) -> Tensor:
        """The base's mean."""
        return self.transforms[0](self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """The base's variance of every coordinate."""
        return self.transforms[0](self.base_dist.variance)


@register_kl(Reshaped, Independent)  # type: ignore[untyped-decorator]
def kl_of_a_gaussian(q: Any, p: Independent) -> Tensor:
    r"""KL of any Gaussian from independent normals: −H(q) − Σ log N(μ; m, s²) + Σ σ² / 2 s², σ² q's marginal variances.

    For other distributions there is no closed form: `NotImplementedError`, upon which callers fall back to Monte Carlo.
    """
    normal = p.base_dist
    gaussian = base = q.base_dist
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(normal, Normal) or not isinstance(base, MultivariateNormal | LowRankMultivariateNormal):
        raise NotImplementedError
    expected_log_prob = normal.log_prob(q.mean) - q.variance / (2 * normal.variance)
    return -gaussian.entropy() - expected_log_prob.flatten(-len(p.event_shape)).sum(-1)
