"""A small normalising flow per sequence: skewed, heavy-tailed, bimodal posteriors. Needs the extra ``flows`` (zuko)."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints, transforms

from ltm_pyro.contracts import LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.unconstrained import UnconstrainedGuide
from ltm_pyro.inference.latent_sites import check_coordinates, prior_sites
from ltm_pyro.utils.extras import extra


class FlowGuide(UnconstrainedGuide):
    r"""A standard normal, passed through a spline per coordinate, a reflection, and an affine map.

    .. math:: z = \mu_i + \sigma_i \odot H_i\, s_i(\epsilon), \quad \epsilon \sim \mathcal{N}(0, I), \quad
        H_i = I - 2 v_i v_i^\top / |v_i|^2

    s is a monotone rational-quadratic spline within ±5 (Durkan et al. 2019, arXiv 1906.04032) and starts as the
    identity. H is a Householder reflection (Tomczak & Welling 2016, arXiv 1611.09630). Local parameters:
    ``{site}_loc``, ``{site}_log_var`` and ``{site}_normal`` are μ, log σ² and v, each (B, N); ``{site}_spline`` is s,
    (B, N, 3·bins−1).
    There is no network, and nothing is amortised. q can be bimodal along one direction, which v chooses.

    Args:
        model: whose latent sites q covers; it is traced once and not stored.
        bins: of each spline, at least 2.

    Raises:
        UsageError: too few bins, or the model has no thoughts (K = 0).
    """

    def __init__(self, model: Model, bins: int = 8) -> None:
        self._spline = extra("zuko", "flows", "FlowGuide").transforms.MonotonicRQSTransform
        check_coordinates(self, prior_sites(model, 1))
        super().__init__(model)
        if bins < 2:
            raise UsageError(f"FlowGuide needs at least 2 bins, got {bins}: use MeanField for a plain Gaussian.")
        self.bins = bins

    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """σ², a random reflection, and the spline of the identity."""
        return {
            f"{name}_log_var": variance.log(),
            f"{name}_normal": torch.randn_like(variance),
            f"{name}_spline": variance.new_zeros(*variance.shape, 3 * self.bins - 1),
        }

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """The standard normal, transformed by spline, reflection and affine map."""
        loc, log_var, normal, spline = (local[f"{name}_{part}"] for part in ("loc", "log_var", "normal", "spline"))
        standard = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        spline_map = self._spline(*spline.split([self.bins, self.bins, self.bins - 1], dim=-1))
        affine = transforms.AffineTransform(loc, (log_var / 2).exp(), event_dim=1)
        return dist.TransformedDistribution(standard, [spline_map, Reflection(normal), affine])


class Reflection(Transform):
    """The Householder reflection x − 2 v (v · x) / |v|²: its own inverse, and volume-preserving."""

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
