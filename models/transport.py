"""A prior that maps noise to thoughts by a network. Shapes: N = L·K thoughts."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.nn.transformer import Transformer


class TransportPrior(PyroModule):
    r"""Unstructured noise, carried to the thoughts by a small Transformer over all of them.

    .. math:: z_0 \sim \mathcal{N}(0, I), \qquad z = U_\alpha(z_0) = z_0 + \mathrm{Transformer}_\alpha(z_0)

    The one latent site is z₀ (``z_0``), so that every guide works on it, its KL from the normal has a closed form, and
    the bound stays exact: p(x | z₀) is a decoder behind U. Nothing is said of the density of z itself, which U need
    not have. The Transformer's last layer starts at 0, so that training starts from the paper's prior. Source: arXiv
    2602.06584, section 3.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        layers, width, heads: of the Transformer, in which every thought sees all others.
    """

    zero: Tensor

    def __init__(self, shape: ThoughtShape, layers: int = 2, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.shape = shape
        self.input = nn.Linear(shape.width, width)
        self.position_ND = nn.Parameter(0.02 * torch.randn(shape.layers * shape.thoughts, width))
        self.transformer = Transformer(layers, width, heads, window=None)
        self.output = nn.Linear(width, shape.width)
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # has the module's dtype and device
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z_0`` inside the surrounding plate; the thoughts that it is carried to."""
        noise = dist.Normal(self.zero, 1.0).expand([*self.shape]).to_event(3)
        return self.transport(pyro.sample("z_0", noise))

    def transport(self, z0_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B L K D"]:
        """U(z₀)."""
        lead = z0_BLKD.shape[:-3].numel()
        z0_BND = z0_BLKD.reshape(lead, self.shape.layers * self.shape.thoughts, self.shape.width)
        hidden_BND = self.transformer(self.input(z0_BND) + self.position_ND)
        return z0_BLKD + self.output(hidden_BND).view(z0_BLKD.shape)
