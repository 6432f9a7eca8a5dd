"""Automatic relevance determination: unused latent dimensions shrink to 0, so that the latent size is inferred."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.nn import PyroModule
from torch import Tensor

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import GlobalLatent


class SparsePrior(PyroModule):
    r"""Normal thoughts whose scales are random variables too, shared by all sequences.

    .. math::
        z_{lkd} = g_{lkd}\, u_{lkd}, \qquad p(g_{lkd}) = \text{HalfCauchy}(\tau), \qquad
        p(u_{lkd}) = \mathcal{N}(0, 1)

    Most of a half-Cauchy's mass is near 0, where the scales of unused dimensions go; its tail is so heavy that a large
    scale costs almost no KL. The posterior over scales is a log-normal per dimension (`scale`, a `GlobalLatent`). The
    site is ``z_unit``, u: this non-centred form decouples q of an unused number from q of its scale. Sources: automatic
    relevance determination, MacKay 1994; the horseshoe, Carvalho et al. 2010.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        tau: τ, the prior median of a scale.
    """

    def __init__(self, shape: ThoughtShape, tau: float = 0.05) -> None:
        super().__init__()
        if not tau > 0:
            raise UsageError(f"SparsePrior needs a tau above 0, got {tau}: 0.05 is a good first try.")
        self.scale = GlobalLatent("z_scale", dist.HalfCauchy, torch.full(tuple(shape), tau), init=torch.ones(*shape))

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z_unit`` inside the surrounding plate and multiplies it by one draw of the scales."""
        scale_LKD = self.scale()
        unit = dist.Normal(torch.zeros_like(scale_LKD), torch.ones_like(scale_LKD))
        return scale_LKD * pyro.sample("z_unit", unit.to_event(3))

    def active(self, threshold: float = 0.3) -> Bool[Tensor, "L K D"]:
        """True for the dimensions in use: those whose median scale is above ``threshold``."""
        return self.scale.median > threshold
