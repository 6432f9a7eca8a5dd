"""A mixture of normals as the prior: sequences fall into clusters. Shapes: M components."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.errors import UsageError


class MixturePrior(PyroModule):
    r"""M clusters of sequences, each with a normal of its own; the cluster of a sequence is summed out.

    .. math:: p(z) = \sum_m \pi_m \prod_{l,k,d} \mathcal{N}(z_{lkd}; m_{mlkd}, s_{mlkd}^2)

    Parameters: ``logits_M`` is log π up to a constant and starts at 0; ``mean_MLKD`` is m and starts at a sample from
    N(0, ``spread``²), so that the components differ; ``log_scale_MLKD`` is log s and starts at 0. Source: Tomczak &
    Welling 2018 (arXiv 1705.07120), the mixture-of-Gaussians prior.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        components: M.
        spread: standard deviation of the initial means.
    """

    def __init__(self, shape: ThoughtShape, components: int = 8, spread: float = 0.5) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"A mixture needs at least 1 component, got {components}.")
        self.logits_M = nn.Parameter(torch.zeros(components))
        self.mean_MLKD = nn.Parameter(spread * torch.randn(components, *shape))
        self.log_scale_MLKD = nn.Parameter(torch.zeros(components, *shape))

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, dist.MixtureSameFamily(dist.Categorical(logits=self.logits_M), self._components()))

    def responsibilities(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B M"]:
        """p(m | z): the probability of each component given a sequence's thoughts."""
        joint_BM = self.logits_M + self._components().log_prob(z_BLKD.unsqueeze(-4))
        return joint_BM.softmax(-1)

    def _components(self) -> Any:
        return dist.Normal(self.mean_MLKD, self.log_scale_MLKD.exp()).to_event(3)
