"""Full-covariance Gaussian: the coordinates of a site are correlated; exact where the posterior is Gaussian."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, biject_to, transforms

from ltm_pyro.contracts import SEQUENCES, Batch, Guide, LocalParameters, Model, Start
from ltm_pyro.sites import prior_moments, prior_sites


class FullCovariance(Guide):
    r"""One Gaussian with full covariance per site and sequence, on the N unconstrained coordinates of the site.

    .. math::
        q(z \mid x_i) = \mathcal{N}(z; \mu_i, L_i L_i^\top), \quad
        L_i = \mathrm{tril}(A_i, -1) + e^{\mathrm{diag} A_i}

    Local parameters: ``{site}_loc`` is μ, shape (B, N), and ``{site}_factor`` is A, shape (B, N, N). N² numbers per
    sequence: for small latent spaces. Sites are independent of each other.

    Args:
        model: whose latent sites q covers; it is looked at once and not kept.
    """

    def __init__(self, model: Model) -> None:
        self.sites = {}
        for name, fn in prior_sites(model, 1).items():
            bijection = biject_to(fn.support)
            self.sites[name] = (bijection, bijection.inverse_shape(fn.event_shape))

    def start(self, sites: Mapping[str, Distribution], start: Start) -> LocalParameters:
        """μ at the prior's mean plus jitter; L diagonal, the prior's scale times exp(``start.log_var`` / 2)."""
        local = {}
        for name in self.sites:
            mean, variance = (x.flatten(1) for x in prior_moments(sites[name]))
            local[f"{name}_loc"] = mean + start.jitter * variance.sqrt() * torch.randn_like(mean)
            local[f"{name}_factor"] = torch.diag_embed((variance.log() + start.log_var) / 2)
        return local

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site from q, reparameterised."""
        with pyro.plate(SEQUENCES, batch.size, dim=-1):
            return {name: pyro.sample(name, self.posterior(name, local)) for name in self.sites}

    def posterior(self, name: str, local: LocalParameters) -> Any:
        """q of one site, batch shape (B,)."""
        bijection, shape = self.sites[name]
        normal = dist.MultivariateNormal(local[f"{name}_loc"], scale_tril=scale_tril(local[f"{name}_factor"]))
        return dist.TransformedDistribution(
            normal, [transforms.ReshapeTransform(torch.Size([shape.numel()]), shape), bijection]
        )

    def natural(self, local: LocalParameters, gradients: LocalParameters) -> LocalParameters:
        r"""L Lᵀ ∇_μ, and L Φ(Lᵀ ∇_L) with Φ the lower triangle, its diagonal halved; the diagonal of A is log L's."""
        natural = {}
        for name in self.sites:
            factor, gradient = local[f"{name}_factor"], gradients[f"{name}_factor"]
            scale = scale_tril(factor)
            diagonal = scale.diagonal(dim1=-2, dim2=-1)
            in_scale = gradient.tril(-1) + torch.diag_embed(gradient.diagonal(dim1=-2, dim2=-1) / diagonal)
            phi = (scale.mT @ in_scale).tril()
            step = scale @ (phi - torch.diag_embed(phi.diagonal(dim1=-2, dim2=-1)) / 2)
            natural[f"{name}_loc"] = (scale @ (scale.mT @ gradients[f"{name}_loc"][..., None]))[..., 0]
            natural[f"{name}_factor"] = step.tril(-1) + torch.diag_embed(step.diagonal(dim1=-2, dim2=-1) / diagonal)
        return natural


def scale_tril(factor_BNN: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B N N"]:
    """L: the strict lower triangle of A, and exp of its diagonal."""
    return factor_BNN.tril(-1) + torch.diag_embed(factor_BNN.diagonal(dim1=-2, dim2=-1).exp())
