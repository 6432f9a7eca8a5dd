"""A Gaussian with covariance between sites. Shapes: N coordinates of one site, M those of the sites before it."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.contracts import Batch, Guide, LocalParameters, sequence_plate
from ltm_pyro.guides.full_covariance import FullCovariance, scale_tril


class JointCovariance(FullCovariance):
    r"""One Gaussian with full covariance per sequence over the unconstrained coordinates of all sites together.

    .. math::
        q(u \mid x_i) = \prod_s \mathcal{N}(u_s; \mu_{is} + C_{is} \epsilon_{<s}, L_{is} L_{is}^\top), \quad
        \epsilon_s = L_{is}^{-1} (u_s - \mu_{is} - C_{is} \epsilon_{<s})

    The sites are sampled in the prior's order, each given the ones before it, so that a topic and what depends on it
    may be correlated. Of one site alone it is `FullCovariance`. Local parameters, of each site: ``{site}_loc`` is μ,
    (B, N); ``{site}_factor`` is A, (B, N, N), with L as in `FullCovariance`; of all but the first, ``{site}_cross`` is
    C, (B, N, M), which starts at 0.

    Raises:
        UsageError: the model has no thoughts (K = 0).
    """

    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """A diagonal L of standard deviations, and no dependence on the sites before."""
        before = 0
        for other, (_, shape) in self.sites.items():
            if other == name:
                break
            before += shape.numel()
        cross = {f"{name}_cross": variance.new_zeros(*variance.shape, before)} if before else {}
        return super().init_scale(name, variance) | cross

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site given the ones before it, with reparameterised gradients."""
        values: dict[str, Tensor] = {}
        noise: list[Tensor] = []  # ε of the sites before
        with sequence_plate(batch.size):
            for name, (bijection, shape) in self.sites.items():
                mean, factor = local[f"{name}_loc"], scale_tril(local[f"{name}_factor"])
                if noise:
                    mean = mean + (local[f"{name}_cross"] @ torch.cat(noise, -1)[..., None])[..., 0]
                q = self.on_support(name, dist.MultivariateNormal(mean, scale_tril=factor))
                values[name] = pyro.sample(name, q)
                u = values[name] if bijection is None else bijection.inv(values[name])
                off = u.reshape(*u.shape[: u.dim() - len(shape)], -1) - mean
                noise.append(torch.linalg.solve_triangular(factor, off[..., None], upper=False)[..., 0])
        return values

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """q of one site alone: N(μ, L Lᵀ + C Cᵀ)."""
        cross = local.get(f"{name}_cross")
        if cross is None:
            return super().base_distribution(name, local)
        factor = scale_tril(local[f"{name}_factor"])
        covariance = factor @ factor.mT + cross @ cross.mT
        return dist.MultivariateNormal(local[f"{name}_loc"], covariance_matrix=covariance)

    def natural_gradient(self, local: LocalParameters, gradients: LocalParameters) -> LocalParameters:
        """Refused where sites depend on each other."""
        if any(name.endswith("_cross") for name in local):
            return Guide.natural_gradient(self, local, gradients)
        return super().natural_gradient(local, gradients)
