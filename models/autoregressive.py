"""An autoregressive prior: a small causal Transformer over a sequence's thoughts. Shapes: N = L·K thoughts."""

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.errors import UsageError
from ltm_pyro.models.density import ThoughtDensity
from ltm_pyro.nn.transformer import Transformer


class ThoughtTransformer(nn.Module):
    """A causal Transformer that predicts every thought's distribution from the thoughts before it.

    Args:
        thought_width: D.
        number: N, thoughts in the sequence.
        layers, width, heads: of the Transformer.
        components: M, normals in the mixture that a thought comes from.
        spread: standard deviation of the initial means, if there are several components.
    """

    def __init__(
        self, thought_width: int, number: int, layers: int, width: int, heads: int, components: int, spread: float
    ) -> None:
        super().__init__()
        self.components, outputs = components, 2 * thought_width + (components > 1)
        # Checkpoints contain these four names.
        self.enter = nn.Linear(thought_width, width)  # input projection
        self.first = nn.Parameter(0.02 * torch.randn(width))  # start embedding, in front of the first thought
        self.read = Transformer(layers, width, heads, window=max(number, 1))
        self.leave = nn.Linear(width, components * outputs)  # output projection
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        if components > 1:  # or they would stay alike
            with torch.no_grad():
                self.leave.bias.unflatten(0, (components, outputs))[:, :thought_width].normal_(0, spread)

    def forward(self, z_BnD: Float[Tensor, "B n thought"]) -> tuple[Tensor, Tensor, Tensor]:
        """Means and log-scales (B, n + 1, M, D) and log-weights (B, n + 1, M) of thoughts 1 … n + 1.

        Args:
            z_BnD: thoughts 1 … n.
        """
        start_B1D, width = self.first.expand(len(z_BnD), 1, -1), z_BnD.shape[-1]
        hidden_BND = self.read(torch.cat([start_B1D, self.enter(z_BnD)], dim=1))
        out_BNMD = self.leave(hidden_BND).unflatten(-1, (self.components, -1))
        mean_BNMD, log_scale_BNMD, logits_BNM1 = out_BNMD.split([width, width, out_BNMD.shape[-1] - 2 * width], -1)
        logits_BNM = logits_BNM1.squeeze(-1) if self.components > 1 else torch.zeros_like(mean_BNMD[..., 0])
        return mean_BNMD, log_scale_BNMD, logits_BNM.log_softmax(-1)


class AutoregressivePrior(PyroModule):
    r"""Each thought depends on all thoughts before it; they are ordered layer by layer.

    .. math:: p(z) = \prod_n \mathcal{N}(z_n;\, m_n(z_{<n}),\, s_n^2(z_{<n})), \quad n = 1 \ldots L K

    m and log s are the output of a small causal Transformer. Its last layer starts at 0, so that training starts from
    the paper's prior. With M components each thought comes from a mixture of M such normals, whose weights are outputs
    too: thoughts can then be one of several things, and which one depends on the thoughts before it.

    .. math:: p(z) = \prod_n \sum_m \pi_m(z_{<n}) \, \mathcal{N}(z_n;\, m_{nm}(z_{<n}),\, s_{nm}^2(z_{<n}))

    The density takes one forward pass, a sample takes L·K. arXiv 2502.01567 leaves a learned prior as an open problem.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        layers, width, heads: of the Transformer.
        components: M.
        spread: standard deviation of the components' initial means.
    """

    def __init__(
        self,
        shape: ThoughtShape,
        layers: int = 2,
        width: int = 64,
        heads: int = 2,
        components: int = 1,
        spread: float = 0.5,
    ) -> None:
        super().__init__()
        if components < 1:
            raise UsageError(f"A mixture needs at least 1 component, got {components}.")
        self.shape = shape
        number = shape.layers * shape.thoughts
        self.thinker = ThoughtTransformer(shape.width, number, layers, width, heads, components, spread)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, ThoughtDensity(self))

    @property
    def is_unimodal(self) -> bool:
        """Whether each thought has one mode, given those before it."""
        return self.thinker.components == 1

    def log_density(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """log p(z) in nats."""
        joint_BNM, _, _ = self._components(z_BLKD)
        return joint_BNM.logsumexp(-1).sum(-1).view(z_BLKD.shape[:-3])

    def component_at(self, z_BLKD: Float[Tensor, "*B L K D"]) -> tuple[Tensor, Tensor]:
        """Mean and variance of the component that each thought is most probably from, given those before it."""
        joint_BNM, mean_BNMD, log_scale_BNMD = self._components(z_BLKD)
        index_BN1D = joint_BNM.argmax(-1)[..., None, None].expand(*joint_BNM.shape[:-1], 1, self.shape.width)
        mean, log_scale = (x.gather(-2, index_BN1D).view(z_BLKD.shape) for x in (mean_BNMD, log_scale_BNMD))
        return mean, (2 * log_scale).exp()

    def _components(self, z_BLKD: Float[Tensor, "*B L K D"]) -> tuple[Tensor, Tensor, Tensor]:
        """log π N(z; m, s²) of every component, and m and log s."""
        size, number = z_BLKD.shape[:-3].numel(), self.shape.layers * self.shape.thoughts
        z_BND = z_BLKD.reshape(size, number, self.shape.width)
        mean_BNMD, log_scale_BNMD, log_weight_BNM = self.thinker(z_BND[:, :-1])
        normal = torch.distributions.Normal(mean_BNMD, log_scale_BNMD.exp(), validate_args=False)
        return normal.log_prob(z_BND.unsqueeze(-2)).sum(-1) + log_weight_BNM, mean_BNMD, log_scale_BNMD

    def sample(self, sample_shape: torch.Size) -> Float[Tensor, "*S L K D"]:
        """z ~ p(z), one thought after the other."""
        layers, thoughts, width = self.shape
        z_BND = self.thinker.first.new_zeros(sample_shape.numel(), 0, width)
        for _ in range(layers * thoughts):
            mean_BMD, log_scale_BMD, log_weight_BM = (x[:, -1] for x in self.thinker(z_BND))
            if self.thinker.components == 1:
                chosen_BM1 = torch.ones_like(log_weight_BM)[..., None]
            else:
                chosen_BM1 = torch.distributions.OneHotCategorical(logits=log_weight_BM).sample()[..., None]
            mean_BD, log_scale_BD = (mean_BMD * chosen_BM1).sum(1), (log_scale_BMD * chosen_BM1).sum(1)
            next_BD = mean_BD + log_scale_BD.exp() * torch.randn_like(mean_BD)
            z_BND = torch.cat([z_BND, next_BD[:, None]], dim=1)
        return z_BND.view(*sample_shape, *self.shape)
