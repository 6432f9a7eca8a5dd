"""Low-rank Gaussian: the coordinates of a site are correlated along a few directions. Shapes: R rank."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.contracts import LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.unconstrained import UnconstrainedGuide


class LowRank(UnconstrainedGuide):
    r"""One Gaussian per site and sequence, with a covariance of rank R plus a diagonal.

    .. math:: q(z \mid x_i) = \mathcal{N}(z; \mu_i, W_i W_i^\top + \mathrm{diag}\, \sigma_i^2)

    Local parameters: ``{site}_loc`` is μ and ``{site}_log_var`` is log σ², each (B, N); ``{site}_factor`` is W, (B, N,
    R), which starts at small random values, σ / 100 · N(0, 1), so that its columns differ. Source: Ong et al. 2018
    (arXiv 1701.03208).

    Args:
        model: whose latent sites q covers; it is traced once and not stored.
        rank: R.
    """

    def __init__(self, model: Model, rank: int = 4) -> None:
        super().__init__(model)
        if rank < 1:
            raise UsageError(f"LowRank needs a rank of at least 1, got {rank}: use MeanField for a rank of 0.")
        self.rank = rank

    def init_scale(self, name: str, variance: Tensor) -> LocalParameters:
        """σ², and a small random W."""
        noise_BNR = torch.randn(*variance.shape, self.rank, dtype=variance.dtype, device=variance.device)
        return {f"{name}_log_var": variance.log(), f"{name}_factor": 0.01 * variance.sqrt()[..., None] * noise_BNR}

    def base_distribution(self, name: str, local: LocalParameters) -> Any:
        """N(μ, W Wᵀ + diag σ²)."""
        loc, factor, log_var = (local[f"{name}_{part}"] for part in ("loc", "factor", "log_var"))
        return dist.LowRankMultivariateNormal(loc, factor, log_var.exp())
