"""A small flow of each sequence's own: skewed, heavy-tailed and two-humped posteriors. Needs the extra ``flows``."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints, transforms

from ltm_pyro.contracts import LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.coordinates import Coordinates
from ltm_pyro.utils.extras import extra


class FlowGuide(Coordinates):
    r"""A spline bends every coordinate of a standard normal, a reflection turns them all, an affine map places them.

    .. math:: z = \mu_i + \sigma_i \odot H_i\, s_i(\epsilon), \quad \epsilon \sim \mathcal{N}(0, I), \quad
        H_i = I - 2 v_i v_i^\top / |v_i|^2

    s is a monotone rational-quadratic spline within ±5 (Durkan et al. 2019, arXiv 1906.04032), at first the identity; H
    is a Householder reflection (Tomczak & Welling 2016, arXiv 1611.09630). Local parameters: ``{site}_loc``,
    ``{site}_log_var`` and ``{site}_normal`` are μ, log σ² and v, each (B, N); ``{site}_spline`` is s, (B, N, 3·bins−1).
    No network and nothing amortised: two humps in any one direction are within reach.

    Args:
        model: whose latent sites q covers; it is looked at once and not kept.
        bins: of each spline.
    """

    def __init__(self, model: Model, bins: int = 8) -> None:
        self._spline = extra("zuko", "flows", "FlowGuide").transforms.MonotonicRQSTransform
        super().__init__(model)
        if bins < 2:
            raise UsageError(f"FlowGuide needs at least 2 bins, got {bins}: MeanField bends nothing.")
        self.bins = bins

    def spread(self, name: str, variance: Tensor) -> LocalParameters:
        """σ², a random reflection, and a straight spline."""
        return {
            f"{name}_log_var": variance.log(),
            f"{name}_normal": torch.randn_like(variance),
            f"{name}_spline": variance.new_zeros(*variance.shape, 3 * self.bins - 1),
        }

    def density(self, name: str, local: LocalParameters) -> Any:
        """The standard normal, bent, reflected and placed."""
        loc, log_var, normal, spline = (local[f"{name}_{part}"] for part in ("loc", "log_var", "normal", "spline"))
        standard = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        bend = self._spline(*spline.split([self.bins, self.bins, self.bins - 1], dim=-1))
        place = transforms.AffineTransform(loc, (log_var / 2).exp(), event_dim=1)
        return dist.TransformedDistribution(standard, [bend, Reflection(normal), place])


class Reflection(Transform):
    """x − 2 v (v · x) / |v|²: its own inverse, and it keeps volume."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, normal_BN: Tensor) -> None:
        super().__init__()
        self.unit_BN = normal_BN / normal_BN.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def _call(self, x: Tensor) -> Tensor:
        return x - 2 * self.unit_BN * (self.unit_BN * x).sum(-1, keepdim=True)

    _inverse = _call

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(x[..., 0])
