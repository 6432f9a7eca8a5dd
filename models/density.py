"""A Pyro distribution over thoughts whose density and samples a network computes."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.nn.precision import full_precision


@runtime_checkable
class ThoughtNetwork(Protocol):
    """What a prior needs for a `ThoughtDensity`: log p(z), and samples from p(z)."""

    shape: ThoughtShape

    def log_density(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """log p(z) in nats."""
        ...

    def sample(self, sample_shape: torch.Size) -> Float[Tensor, "*S L K D"]:
        """z ~ p(z)."""
        ...


class ThoughtDensity(TorchDistribution):
    """p(z) of a `ThoughtNetwork`, the same for every sequence. Event shape (L, K, D); `expand` sets the batch shape."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 3)

    def __init__(self, network: ThoughtNetwork, batch_shape: Any = ()) -> None:
        self.network = network
        super().__init__(torch.Size(batch_shape), torch.Size(network.shape), validate_args=False)

    def log_prob(self, value: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """log p(z) in nats, in full precision even under autocast."""
        with full_precision(value):
            return self.network.log_density(value)

    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "*S L K D"]:
        """z ~ p(z)."""
        with torch.no_grad():
            return self.network.sample(torch.Size(sample_shape) + self.batch_shape)

    @property
    def is_unimodal(self) -> bool:
        """Whether the network says that its density has one mode; otherwise q has several starts."""
        return getattr(self.network, "is_unimodal", False)

    def component_at(
        self, value: Float[Tensor, "*B L K D"]
    ) -> tuple[Float[Tensor, "*B L K D"], Float[Tensor, "*B L K D"]] | None:
        """Mean and variance of the component that z is probably from, where the network has components."""
        component_at: Any = getattr(self.network, "component_at", None)
        found: tuple[Tensor, Tensor] | None = component_at and component_at(value)
        return found

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ThoughtDensity":
        """The same density with another batch shape."""
        return ThoughtDensity(self.network, batch_shape)
