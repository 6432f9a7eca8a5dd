"""The paper's prior: independent standard normal thoughts."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor

from ltm_pyro.contracts import ThoughtShape, Z


class GaussianPrior(PyroModule):
    r"""Isotropic Gaussian thoughts (arXiv 2502.01567, section 2).

    .. math:: p(z) = \prod_{l,k,d} \mathcal{N}(z_{lkd}; 0, 1)

    Args:
        shape: (L, K, D) of one sequence's thoughts.
    """

    zero: Tensor

    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # carries dtype and device

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        standard = dist.Normal(self.zero, torch.ones_like(self.zero))
        return pyro.sample(Z, standard.expand(list(self.shape)).to_event(3))
