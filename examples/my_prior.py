"""A prior in a file of your own: most coordinates of a thought are close to zero.

    ltm fit --config studies/recipes/quickstart.yaml --model.prior examples/my_prior.py:SpikeAndSlab \
        --model.prior.rate 0.1
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from ltm_pyro import ThoughtShape


class SpikeAndSlab(PyroModule):
    r"""Every coordinate is N(0, 1), the slab, with probability ``rate``, and otherwise N(0, ``spike``²), the spike."""

    def __init__(self, shape: ThoughtShape, rate: float = 0.1, spike: float = 0.05) -> None:
        super().__init__()
        self.logit = torch.nn.Parameter(torch.logit(torch.full(tuple(shape), rate)))  # learned, one rate per coordinate
        self.register_buffer("scales", torch.tensor([1.0, spike]))

    def forward(self) -> torch.Tensor:
        """Samples z inside the plate of sequences; the choice between slab and spike is summed out."""
        choice = dist.Categorical(logits=torch.stack([self.logit, torch.zeros_like(self.logit)], dim=-1))
        components = dist.Normal(0.0, self.scales.expand(*self.logit.shape, 2))
        return pyro.sample("z", dist.MixtureSameFamily(choice, components).to_event(3))
