"""An autoregressive prior: a small causal Transformer over a sequence's thoughts. Shapes: N = L·K thoughts."""

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.models.density import ThoughtDensity
from ltm_pyro.nn.transformer import Transformer


class ThoughtTransformer(nn.Module):
    """A causal Transformer that predicts the mean and log-scale of every thought from the thoughts before it.

    Args:
        thought_width: D.
        number: N, thoughts in the sequence.
        layers, width, heads: of the Transformer.
    """

    def __init__(self, thought_width: int, number: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        # Checkpoints contain these four names.
        self.enter = nn.Linear(thought_width, width)  # input projection
        self.first = nn.Parameter(0.02 * torch.randn(width))  # start embedding, in front of the first thought
        self.read = Transformer(layers, width, heads, window=max(number, 1))
        self.leave = nn.Linear(width, 2 * thought_width)  # output projection
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z_BnD: Float[Tensor, "B n thought"]) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of thoughts 1 … n + 1, each (B, n + 1, D), given thoughts 1 … n."""
        start_B1D = self.first.expand(len(z_BnD), 1, -1)
        hidden_BND = self.read(torch.cat([start_B1D, self.enter(z_BnD)], dim=1))
        mean_BND, log_scale_BND = self.leave(hidden_BND).chunk(2, dim=-1)
        return mean_BND, log_scale_BND


class AutoregressivePrior(PyroModule):
    r"""Each thought depends on all thoughts before it; they are ordered layer by layer.

    .. math:: p(z) = \prod_n \mathcal{N}(z_n;\, m_n(z_{<n}),\, s_n^2(z_{<n})), \quad n = 1 \ldots L K

    m and log s are the output of a small causal Transformer. Its last layer starts at 0, so that training starts from
    the paper's prior. The density takes one forward pass, a sample takes L·K. arXiv 2502.01567 leaves a learned prior
    as an open problem.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        layers, width, heads: of the Transformer.
    """

    def __init__(self, shape: ThoughtShape, layers: int = 2, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.shape = shape
        self.thinker = ThoughtTransformer(shape.width, shape.layers * shape.thoughts, layers, width, heads)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, ThoughtDensity(self))

    def log_density(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """log p(z) in nats."""
        size, number = z_BLKD.shape[:-3].numel(), self.shape.layers * self.shape.thoughts
        z_BND = z_BLKD.reshape(size, number, self.shape.width)
        mean_BND, log_scale_BND = self.thinker(z_BND[:, :-1])
        log_prob_BND = torch.distributions.Normal(mean_BND, log_scale_BND.exp(), validate_args=False).log_prob(z_BND)
        return log_prob_BND.sum((-2, -1)).view(z_BLKD.shape[:-3])

    def sample(self, sample_shape: torch.Size) -> Float[Tensor, "*S L K D"]:
        """z ~ p(z), one thought after the other."""
        layers, thoughts, width = self.shape
        z_BND = self.thinker.first.new_zeros(sample_shape.numel(), 0, width)
        for _ in range(layers * thoughts):
            mean_BND, log_scale_BND = self.thinker(z_BND)
            next_BD = mean_BND[:, -1] + log_scale_BND[:, -1].exp() * torch.randn_like(mean_BND[:, -1])
            z_BND = torch.cat([z_BND, next_BD[:, None]], dim=1)
        return z_BND.view(*sample_shape, *self.shape)
