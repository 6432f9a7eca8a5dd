"""Gaussians with covariance: between all coordinates of a site, or within each thought."""

from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Size, Tensor

from ltm_pyro.contracts import LocalParameters, Model
from ltm_pyro.guides.unconstrained import UnconstrainedGuide
from ltm_pyro.inference.latent_sites import check_coordinates, prior_sites


class FullCovariance(UnconstrainedGuide):
    r"""One Gaussian with full covariance per site and sequence, on the N unconstrained coordinates of the site.

    .. math::
        q(z \mid x_i) = \mathcal{N}(z; \mu_i, L_i L_i^\top), \quad
        L_i = \mathrm{tril}(A_i, -1) + e^{\mathrm{diag} A_i}

    Local parameters: ``{site}_loc`` is μ, shape (B, N), and ``{site}_factor`` is A, shape (B, N, N). N² numbers per
    sequence: for small latent spaces. Exact if the posterior is Gaussian.

    Raises:
        UsageError: the model has no thoughts (K = 0).
    """

    def __init__(self, model: Model) -> None:
        check_coordinates(self, prior_sites(model, 1))
        super().__init__(model)

    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """A diagonal L of standard deviations."""
        return {f"{name}_factor": torch.diag_embed(variance.log() / 2)}

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """N(μ, L Lᵀ)."""
        loc = local[f"{name}_loc"]
        normal = dist.MultivariateNormal(loc, scale_tril=scale_tril(local[f"{name}_factor"]))
        return normal.to_event(loc.dim() - 2)

    def natural_gradient(self, local: LocalParameters, gradients: LocalParameters) -> LocalParameters:
        r"""L Lᵀ ∇_μ for μ, and L Φ(Lᵀ ∇_L) for L, where Φ takes the lower triangle and halves its diagonal.

        The gradient is converted from A to L and the step back to A: the diagonal of A is the logarithm of L's.
        """
        natural = {}
        for name in self.sites:
            factor, gradient = local[f"{name}_factor"], gradients[f"{name}_factor"]
            scale = scale_tril(factor)
            diagonal = scale.diagonal(dim1=-2, dim2=-1)
            gradient_L = gradient.tril(-1) + torch.diag_embed(gradient.diagonal(dim1=-2, dim2=-1) / diagonal)
            phi = (scale.mT @ gradient_L).tril()
            step = scale @ (phi - torch.diag_embed(phi.diagonal(dim1=-2, dim2=-1)) / 2)
            natural[f"{name}_loc"] = (scale @ (scale.mT @ gradients[f"{name}_loc"][..., None]))[..., 0]
            natural[f"{name}_factor"] = step.tril(-1) + torch.diag_embed(step.diagonal(dim1=-2, dim2=-1) / diagonal)
        return natural


class BlockCovariance(FullCovariance):
    r"""A Gaussian with full covariance within each thought, and none between thoughts.

    .. math:: q(z \mid x_i) = \prod_{l,k} \mathcal{N}(z_{lk}; \mu_{ilk}, L_{ilk} L_{ilk}^\top)

    Local parameters: ``{site}_loc`` is μ, shape (B, *event), and ``{site}_factor`` is A, shape (B, *event, D), with D
    the last axis of the site. D numbers per coordinate.
    """

    def coordinate_shape(self, shape: Size) -> Size:
        """The site's event shape; a scalar is a block of 1."""
        return shape or Size([1])


def scale_tril(factor_NN: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B N N"]:
    """L: the strict lower triangle of A, with exp of A's diagonal as its diagonal."""
    return factor_NN.tril(-1) + torch.diag_embed(factor_NN.diagonal(dim1=-2, dim2=-1).exp())
