"""Mean-field Gaussian: a mean and a variance for every coordinate of every latent site."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.contracts import Batch, Guide, Init, LocalParameters, Model, sequence_plate
from ltm_pyro.guides.fused_normal import FusedNormal
from ltm_pyro.inference.latent_sites import Sites, bijections, prior_moments, prior_sites, unconstrained


class MeanField(Guide):
    r"""Independent Gaussians on the unconstrained coordinates of every site, with parameters per sequence.

    .. math:: q(z \mid x_i) = \mathcal{N}(z; \mu_i, \mathrm{diag}\, \sigma_i^2)

    Local parameters: ``{site}_loc`` is μ and ``{site}_log_var`` is log σ², each of shape (B, *event). Sites with
    constrained support are reached through `torch.distributions.biject_to`. Source: arXiv 2502.01567, section 2.

    Args:
        model: whose latent sites q covers; it is traced once and not stored.
    """

    def __init__(self, model: Model) -> None:
        self.sites = {
            name: (None if unconstrained(fn) else bijection, len(fn.event_shape))
            for name, (fn, bijection) in bijections(prior_sites(model, 1)).items()
        }

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """μ at the prior's mean plus jitter, log σ² at the prior's log-variance plus ``init.log_var``."""
        local = {}
        for name in self.sites:
            mean, variance = prior_moments(sites[name])
            local[f"{name}_loc"] = mean + init.jitter * variance.sqrt() * torch.randn_like(mean)
            local[f"{name}_log_var"] = variance.log() + init.log_var
        return local

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site from q with reparameterised gradients."""
        with sequence_plate(batch.size):
            return {name: pyro.sample(name, self.posterior(name, local)) for name in self.sites}

    def natural_gradient(self, local: LocalParameters, gradients: LocalParameters) -> LocalParameters:
        """σ² ∇_μ and 2 ∇_(log σ²): the Fisher information of μ is 1/σ², that of log σ² is 1/2."""
        natural = {}
        for name in self.sites:
            natural[f"{name}_loc"] = local[f"{name}_log_var"].exp() * gradients[f"{name}_loc"]
            natural[f"{name}_log_var"] = 2 * gradients[f"{name}_log_var"]
        return natural

    def posterior(self, name: str, local: LocalParameters) -> Any:
        """q of one site on its support; batch shape (B,)."""
        bijection, event_dim = self.sites[name]
        normal = FusedNormal(local[f"{name}_loc"], (local[f"{name}_log_var"] / 2).exp())
        if bijection is None:
            return normal.to_event(event_dim)
        return dist.TransformedDistribution(normal.to_event(len(normal.batch_shape) - 1), bijection)
