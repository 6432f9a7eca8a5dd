"""Mean-field Gaussian: every coordinate of every latent site has a mean and a variance of its own."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Normal, register_kl

from ltm_pyro.contracts import Batch, Guide, Init, LocalParameters, Model, sequence_plate
from ltm_pyro.inference.latent_sites import Sites, bijections, prior_moments, prior_sites, unconstrained


class MeanField(Guide):
    r"""Independent Gaussians on the unconstrained coordinates of every site, one set per sequence.

    .. math:: q(z \mid x_i) = \mathcal{N}(z; \mu_i, \mathrm{diag}\, \sigma_i^2)

    Local parameters: ``{site}_loc`` is μ and ``{site}_log_var`` is log σ², each of shape (B, *event). Sites with
    constrained support are pushed through `torch.distributions.biject_to`. Source: arXiv 2502.01567, section 2.

    Args:
        model: whose latent sites q covers; it is looked at once and not kept.
    """

    def __init__(self, model: Model) -> None:
        self.sites = {
            name: (None if unconstrained(fn) else bijection, len(fn.event_shape))
            for name, (fn, bijection) in bijections(prior_sites(model, 1)).items()
        }

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """μ at the prior's mean plus jitter, log σ² at the prior's log-variance plus ``start.log_var``."""
        local = {}
        for name in self.sites:
            mean, variance = prior_moments(sites[name])
            local[f"{name}_loc"] = mean + init.jitter * variance.sqrt() * torch.randn_like(mean)
            local[f"{name}_log_var"] = variance.log() + init.log_var
        return local

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples every site from q, reparameterised."""
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
        """q of one site, batch shape (B,)."""
        bijection, event_dim = self.sites[name]
        normal = Factorised(local[f"{name}_loc"], (local[f"{name}_log_var"] / 2).exp())
        if bijection is None:
            return normal.to_event(event_dim)
        return dist.TransformedDistribution(normal.to_event(len(normal.batch_shape) - 1), bijection)


class Factorised(dist.Normal):
    """Normals of which the KL from other normals takes half the passes over memory that autograd needs."""


@register_kl(Factorised, Normal)  # type: ignore[untyped-decorator]
def kl_of_normals(q: Normal, p: Normal) -> Tensor:
    """(r² + d² − 1) / 2 − log r, with d = (μ_q − μ_p) / σ_p and r = σ_q / σ_p."""
    kl: Tensor = _NormalKL.apply(q.loc, q.scale, p.loc, p.scale)
    return kl


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
        d, r = (q_loc - p_loc).div_(p_scale), q_scale / p_scale
        ctx.save_for_backward(d, r, p_scale)
        return r.log().neg_().addcmul_(d, d, value=0.5).addcmul_(r, r, value=0.5).sub_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, r, p_scale = ctx.saved_tensors
        slope = grad / p_scale
        to_loc, to_scale = d * slope, (r - r.reciprocal()).mul_(slope)
        if not any(ctx.needs_input_grad[2:]):
            return to_loc, to_scale, None, None
        return to_loc, to_scale, -to_loc, (1 - d**2 - r**2).mul_(slope)
