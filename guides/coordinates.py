"""What Gaussian-like guides have in common: every site as unconstrained coordinates, pushed to its support."""

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
from ltm_pyro.inference.latent_sites import Sites, bijections, prior_moments, prior_sites, unconstrained


class Coordinates(Guide):
    r"""A density over each site's unconstrained coordinates; sites are independent of each other.

    A family says how it lays the coordinates out (`layout`), where their spread begins (`spread`) and what q is there
    (`density`). ``{site}_loc`` is its centre, shape (B, *layout).

    Args:
        model: whose latent sites q covers; it is looked at once and not kept.
    """

    def __init__(self, model: Model) -> None:
        self.sites = {
            name: (None if unconstrained(fn) else bijection, Size(bijection.inverse_shape(fn.event_shape)))
            for name, (fn, bijection) in bijections(prior_sites(model, 1)).items()
        }

    def layout(self, shape: Size) -> Size:
        """The shape in which q keeps the coordinates of one sequence: all N in a row."""
        return Size([shape.numel()])

    @abstractmethod
    def spread(self, name: str, variance: Tensor) -> LocalParameters:
        """Local parameters beside the centre, for a variance of shape (B, *layout) at every coordinate."""

    @abstractmethod
    def density(self, name: str, local: LocalParameters) -> Any:
        """q of the coordinates: batch shape (B,), event shape *layout."""

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """The centre at the prior's mean plus jitter, the variance the prior's times exp(``start.log_var``)."""
        local = {}
        for name, (_, shape) in self.sites.items():
            mean, variance = (x.reshape(len(x), *self.layout(shape)) for x in prior_moments(sites[name]))
            local[f"{name}_loc"] = mean + init.jitter * variance.sqrt() * torch.randn_like(mean)
            local |= self.spread(name, variance * torch.tensor(init.log_var).exp())
        return local

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site from q, reparameterised."""
        with sequence_plate(batch.size):
            return {name: pyro.sample(name, self.posterior(name, local)) for name in self.sites}

    def posterior(self, name: str, local: LocalParameters) -> Any:
        """q of one site, batch shape (B,)."""
        bijection, shape = self.sites[name]
        base, reshape = self.density(name, local), transforms.ReshapeTransform(self.layout(shape), shape)
        if bijection is None:
            return Reshaped(base, [reshape])
        return dist.TransformedDistribution(base, [reshape, bijection])


class Reshaped(dist.TransformedDistribution):
    """A distribution whose event has another shape and nothing else is changed."""

    @property
    def mean(self) -> Tensor:
        """The base's."""
        return self.transforms[0](self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """The base's, of every coordinate."""
        return self.transforms[0](self.base_dist.variance)


@register_kl(Reshaped, Independent)  # type: ignore[untyped-decorator]
def kl_of_a_gaussian(q: Any, p: Independent) -> Tensor:
    r"""KL of any Gaussian from independent normals: −H(q) − Σ log N(μ; m, s²) + Σ σ² / 2 s², σ² q's marginal variances.

    Elsewhere it is not known, and `NotImplementedError` says so to whoever then takes it from draws.
    """
    normal, event = p.base_dist, q.base_dist
    if not isinstance(normal, Normal) or not isinstance(
        _innermost(event), MultivariateNormal | LowRankMultivariateNormal
    ):
        raise NotImplementedError
    cross = normal.log_prob(q.mean) - q.variance / (2 * normal.variance)
    return -event.entropy() - cross.flatten(-len(p.event_shape)).sum(-1)


def _innermost(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn
