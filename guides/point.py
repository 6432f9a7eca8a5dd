"""A point estimate per sequence (MAP), and its Laplace approximation. Shapes: N coordinates of one site."""

from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Batch, LocalParameters, Model
from ltm_pyro.guides.unconstrained import UnconstrainedGuide
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_moments, prior_sites


class Point(UnconstrainedGuide):
    r"""The most probable thoughts of each sequence, on the unconstrained coordinates of every site.

    .. math:: \hat u_i = \arg\max_u \log p(x_i, z(u)) + \log |\det \partial z / \partial u|

    Local parameters: ``{site}_loc`` is û, (B, N). The fast steps maximise the log joint density. A point has no
    density, so there is no bound.
    """

    has_density = False

    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """No parameters: a point has no scale."""
        return {}

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """A point mass at û whose log-density is masked to 0.

        `Delta` compares its value with û exactly, which fails after rounding on the way to the support and back.
        """
        return dist.Delta(local[f"{name}_loc"], event_dim=1).mask(False)


class Laplace(Point):
    r"""The Laplace approximation: a Gaussian at the MAP estimate, with the inverse Hessian there as its covariance.

    .. math:: q(u \mid x_i) = \mathcal{N}(u; \hat u_i, H_i^{-1}), \quad H_i = -\nabla^2 \log p(x_i, z(u)) |_{\hat u_i}

    The fast steps find û; then 2N gradients give H by central differences. H is scaled by the prior's standard
    deviations, and its eigenvalues below 1, the curvature of a normal prior alone, are raised to 1: otherwise a flat or
    convex log density would give no covariance. The ELBO is a true bound, because its draws come from this Gaussian.
    Local parameters: ``{site}_loc``, and after `finalize` also ``{site}_factor``, (B, N, N), the Cholesky factor of
    H⁻¹, with one H per site. Source: MacKay 1992.
    """

    has_density = True

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """A point during the fast steps, N(û, H⁻¹) after `finalize`."""
        factor = local.get(f"{name}_factor")
        if factor is None:
            return super().base_distribution(name, local)
        return dist.MultivariateNormal(local[f"{name}_loc"], scale_tril=factor)

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """Adds the Cholesky factors of the covariances."""
        factors, sites = {}, prior_sites(model, *prior_arguments(model, batch))
        for name in self.sites:
            with fix_global_draws(model, torch.initial_seed()):  # the differences are between gradients of one density
                hessian_BNN = self._hessian(model, batch, local, f"{name}_loc")
            scale_BN1 = prior_moments(sites[name])[1].sqrt().flatten(1)[..., None]
            values, vectors = torch.linalg.eigh(scale_BN1 * hessian_BNN * scale_BN1.mT)
            root = scale_BN1 * vectors / values.clamp(min=1.0).sqrt()[..., None, :]
            factors[f"{name}_factor"] = torch.linalg.cholesky(root @ root.mT)
        return {**local, **factors}

    def finalize_cost(self, steps: int) -> int:
        """Two gradients per coordinate."""
        return 2 * sum(shape.numel() for _, shape in self.sites.values())

    def _hessian(self, model: Model, batch: Batch, local: LocalParameters, name: str) -> Float[Tensor, "B N N"]:
        """−∇² log p(x, z(u)) in the coordinates ``name``, by central differences of the gradient."""

        def gradient(u_BN: Tensor) -> Tensor:
            with torch.enable_grad():
                u_BN = u_BN.detach().requires_grad_()
                log_joint = elbo_terms(model, self, batch, {**local, name: u_BN}).elbo_B.sum()
                return torch.autograd.grad(log_joint, u_BN)[0]

        u_BN, step, rows = local[name], 1e-2, []
        for index in range(u_BN.shape[1]):
            offset_N = torch.zeros_like(u_BN[0])
            offset_N[index] = step
            after_BN, before_BN = gradient(u_BN + offset_N), gradient(u_BN - offset_N)
            rows.append((before_BN - after_BN) / (2 * step))
        hessian_BNN = torch.stack(rows, dim=1)
        return (hessian_BNN + hessian_BNN.mT) / 2
