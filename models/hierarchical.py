"""A topic, then the thoughts layer by layer, each a sample site of its own. Shapes: U width of the topic."""

from typing import cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError


class HierarchicalPrior(PyroModule):
    r"""A topic u for each sequence; every layer's thoughts depend on it and on the thoughts of the layer before.

    .. math::
        p(u) = \mathcal{N}(0, I), \quad
        p(z_l \mid z_{l-1}, u) = \mathcal{N}(z_l;\, W_l z_{l-1} + V_l u + b_l,\, s_l^2), \quad z_0 = 0

    W maps each thought separately; V maps the topic to all thoughts of a layer. V, b and W start at 0 and s at 1, so
    that training starts from the paper's prior. Sites: ``z_topic``, then ``z_1`` … ``z_L``. Source: the top-down path
    of ladder models, Sønderby et al. 2016 (arXiv 1602.02282).

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        topic: U, the width of the topic.
    """

    zero: Tensor

    def __init__(self, shape: ThoughtShape, topic: int = 16) -> None:
        super().__init__()
        if topic < 1:
            raise UsageError(f"The topic needs a width of at least 1, got {topic}.")
        self.shape, self.topic = shape, topic
        layers, thoughts, width = shape
        self.below = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers - 1))
        self.above = nn.ModuleList(nn.Linear(topic, thoughts * width) for _ in range(layers))
        self.log_scale_LKD = nn.Parameter(torch.zeros(*shape))
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # has the module's dtype and device
        for weight in (*self.below.parameters(), *self.above.parameters()):
            nn.init.zeros_(weight)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the topic and every layer's thoughts inside the surrounding plate."""
        u_BU = pyro.sample("z_topic", dist.Normal(self.zero, 1.0).expand([self.topic]).to_event(1))
        layers: list[Tensor] = []
        for index, above in enumerate(self.above):
            mean_BKD = cast(Tensor, above(u_BU)).unflatten(-1, (self.shape.thoughts, self.shape.width))
            if layers:
                mean_BKD = mean_BKD + self.below[index - 1](layers[-1])
            layer = dist.Normal(mean_BKD, self.log_scale_LKD[index].exp()).to_event(2)
            layers.append(pyro.sample(f"z_{index + 1}", layer))
        return torch.stack(layers, dim=-3)
