"""One point per sequence (MAP), and the Gaussian that fits there (Laplace). Shapes: N coordinates of all sites."""

from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Batch, LocalParameters, Model
from ltm_pyro.guides.coordinates import Coordinates
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_moments, prior_sites


class Point(Coordinates):
    r"""The most probable thoughts of each sequence, on the unconstrained coordinates of every site.

    .. math:: \hat u_i = \arg\max_u \log p(x_i, z(u)) + \log |\det \partial z / \partial u|

    Local parameters: ``{site}_loc`` is û, (B, N). A point has no density, and so no bound: what climbs is the log joint
    density.
    """

    has_density = False

    def spread(self, name: str, variance: Tensor) -> LocalParameters:
        """None."""
        return {}

    def density(self, name: str, local: LocalParameters) -> Any:
        """All mass at û, as a density of 1 there: masked, since a way to the support and back need not end at û."""
        return dist.Delta(local[f"{name}_loc"], event_dim=1).mask(False)


class Laplace(Point):
    r"""A Gaussian at the most probable thoughts, as wide as the log joint density is curved there.

    .. math:: q(u \mid x_i) = \mathcal{N}(u; \hat u_i, H_i^{-1}), \quad H_i = -\nabla^2 \log p(x_i, z(u)) |_{\hat u_i}

    The fast steps find û; then 2N gradients give H by central differences. In units of the prior's scale eigenvalues
    below 1, the curvature of the prior alone, are raised to 1: where the density is flat or bent the other way H says
    nothing. The bound is honest: its draws come from this Gaussian. Local parameters: ``{site}_loc``, and once settled
    ``{site}_factor``, (B, N, N), the Cholesky factor of H⁻¹ of each site alone. Source: MacKay 1992.
    """

    has_density = True

    def density(self, name: str, local: LocalParameters) -> Any:
        """A point during the climb, N(û, H⁻¹) after it."""
        factor = local.get(f"{name}_factor")
        if factor is None:
            return super().density(name, local)
        return dist.MultivariateNormal(local[f"{name}_loc"], scale_tril=factor)

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """Adds the factors."""
        factors, sites = {}, prior_sites(model, batch.size)
        for name in self.sites:
            with fix_global_draws(model, torch.initial_seed()):  # a difference of gradients of one density
                curvature_BNN = self._curvature(model, batch, local, f"{name}_loc")
            scale_BN1 = prior_moments(sites[name])[1].sqrt().flatten(1)[..., None]
            values, vectors = torch.linalg.eigh(scale_BN1 * curvature_BNN * scale_BN1.mT)
            root = scale_BN1 * vectors / values.clamp(min=1.0).sqrt()[..., None, :]
            factors[f"{name}_factor"] = torch.linalg.cholesky(root @ root.mT)
        return {**local, **factors}

    def finalize_cost(self, steps: int) -> int:
        """Two a coordinate."""
        return 2 * sum(shape.numel() for _, shape in self.sites.values())

    def _curvature(self, model: Model, batch: Batch, local: LocalParameters, name: str) -> Float[Tensor, "B N N"]:
        centre_BN, step = local[name], 1e-2
        rows = []
        for index in range(centre_BN.shape[1]):
            nudge_N = torch.zeros_like(centre_BN[0])
            nudge_N[index] = step
            up, down = (self._slope(model, batch, local, name, centre_BN + sign * nudge_N) for sign in (1, -1))
            rows.append((down - up) / (2 * step))
        curvature = torch.stack(rows, dim=1)
        return (curvature + curvature.mT) / 2

    def _slope(self, model: Model, batch: Batch, local: LocalParameters, name: str, at_BN: Tensor) -> Tensor:
        with torch.enable_grad():
            at_BN = at_BN.detach().requires_grad_()
            (slope_BN,) = torch.autograd.grad(
                elbo_terms(model, self, batch, {**local, name: at_BN}).elbo_B.sum(), at_BN
            )
        return slope_BN
