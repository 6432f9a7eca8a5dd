"""Langevin dynamics: each sequence's thoughts as one draw of a sampler, the paper's other baseline."""

import math
from dataclasses import replace

import torch

from ltm_pyro.contracts import Batch, Init, LocalParameters, Model
from ltm_pyro.guides.point import Point
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.latent_sites import Sites


class Langevin(Point):
    r"""Unadjusted Langevin dynamics on the unconstrained coordinates of every site, one chain per sequence.

    .. math:: u \leftarrow u + \eta \nabla_u \log p(x_i, z(u)) + \sqrt{2 \eta}\, \epsilon, \quad
        \epsilon \sim \mathcal{N}(0, I)

    It stands behind the same call as a fit: T_fast steps at rate η, from the prior. η of 0.01 or less is stable where
    an optimiser's 0.3 is not. The last position is one approximate draw from the posterior; its density is unknown, so
    there is no bound. Local parameters: ``{site}_loc``, (B, N). Source: arXiv 2502.01567, its comparison of posteriors.
    """

    uses_fast_steps = False

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """A draw from the normal of the prior's mean and variance, whatever ``start`` says."""
        return super().init(sites, replace(init, jitter=1.0))

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """Runs the chains."""
        for _ in range(steps):
            with torch.enable_grad():
                local = {name: u.detach().requires_grad_() for name, u in local.items()}
                joint = elbo_terms(model, self, batch, local).elbo_B.sum()
                slopes = torch.autograd.grad(joint, list(local.values()))
            moved = zip(local.items(), slopes, strict=True)
            local = {n: u + rate * slope + math.sqrt(2 * rate) * torch.randn_like(u) for (n, u), slope in moved}
        return {name: u.detach() for name, u in local.items()}

    def finalize_cost(self, steps: int) -> int:
        """One a step."""
        return steps
