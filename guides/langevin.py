"""Langevin dynamics: one MCMC draw of each sequence's thoughts, the paper's other baseline."""

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

    It is called as local inference is: T_fast steps at rate η, started at the prior. Use an η of 0.01 or less: 0.3, a
    usual rate of an optimizer, diverges. The last position is one approximate draw from the posterior; its density is
    unknown, so there is no bound. Local parameters: ``{site}_loc``, (B, N). Source: arXiv 2502.01567, its comparison of
    posteriors.
    """

    uses_fast_steps = False

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """A draw from a normal with the prior's mean and variance; ``init.jitter`` is ignored."""
        return super().init(sites, replace(init, jitter=1.0))

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """The last positions of the chains after ``steps`` Langevin steps of size ``rate``."""
        for _ in range(steps):
            with torch.enable_grad():
                local = {name: u.detach().requires_grad_() for name, u in local.items()}
                joint = elbo_terms(model, self, batch, local).elbo_B.sum()
                gradients = torch.autograd.grad(joint, list(local.values()))
            local = {
                name: u + rate * gradient + math.sqrt(2 * rate) * torch.randn_like(u)
                for (name, u), gradient in zip(local.items(), gradients, strict=True)
            }
        return {name: u.detach() for name, u in local.items()}

    def finalize_cost(self, steps: int) -> int:
        """One gradient per step."""
        return steps
