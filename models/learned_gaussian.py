"""Independent normal thoughts with learned means and scales."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z


class LearnedGaussianPrior(PyroModule):
    r"""A normal of its own for every layer, thought and dimension: empirical Bayes (Robbins 1956).

    .. math:: p(z) = \prod_{l,k,d} \mathcal{N}(z_{lkd}; m_{lkd}, s_{lkd}^2)

    Parameters: ``mean_LKD`` is m, ``log_scale_LKD`` is log s; both start at 0. The ELBO is highest if m and s² are the
    mean and the variance of the aggregated posterior, the average of q over all sequences.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
    """

    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__()
        self.mean_LKD = nn.Parameter(torch.zeros(*shape))
        self.log_scale_LKD = nn.Parameter(torch.zeros(*shape))

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, dist.Normal(self.mean_LKD, self.log_scale_LKD.exp()).to_event(3))
