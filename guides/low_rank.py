"""Low-rank Gaussian: a few directions in which all coordinates of a site move together. Shapes: R rank."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.contracts import LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.coordinates import Coordinates


class LowRank(Coordinates):
    r"""One Gaussian per site and sequence whose covariance is a diagonal plus R directions.

    .. math:: q(z \mid x_i) = \mathcal{N}(z; \mu_i, W_i W_i^\top + \mathrm{diag}\, \sigma_i^2)

    Local parameters: ``{site}_loc`` is μ and ``{site}_log_var`` is log σ², each (B, N); ``{site}_factor`` is W, (B, N,
    R), which starts at a hundredth of σ so that its directions differ. Source: Ong et al. 2018 (arXiv 1701.03208).

    Args:
        model: whose latent sites q covers; it is looked at once and not kept.
        rank: R.
    """

    def __init__(self, model: Model, rank: int = 4) -> None:
        super().__init__(model)
        if rank < 1:
            raise UsageError(f"LowRank needs a rank of at least 1, got {rank}: MeanField has none.")
        self.rank = rank

    def spread(self, name: str, variance: Tensor) -> LocalParameters:
        """σ², and a faint random W."""
        noise_BNR = torch.randn(*variance.shape, self.rank, dtype=variance.dtype, device=variance.device)
        return {f"{name}_log_var": variance.log(), f"{name}_factor": 0.01 * variance.sqrt()[..., None] * noise_BNR}

    def density(self, name: str, local: LocalParameters) -> Any:
        """N(μ, W Wᵀ + diag σ²)."""
        loc, factor, log_var = (local[f"{name}_{part}"] for part in ("loc", "factor", "log_var"))
        return dist.LowRankMultivariateNormal(loc, factor, log_var.exp())
