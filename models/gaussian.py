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

    zeros: Tensor
    ones: Tensor

    def __init__(self, shape: ThoughtShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("zeros", torch.zeros(shape), persistent=False)
        self.register_buffer("ones", torch.ones(shape), persistent=False)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, dist.Normal(self.zeros, self.ones).to_event(3))
