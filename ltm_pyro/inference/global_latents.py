"""Random variables that all sequences share, and what training has come to believe of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from ltm_pyro.contracts import Model
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.utils.rng import seeded


class GlobalLatent(PyroModule):
    r"""A global random variable g of a prior, with a posterior q(g) of its own that the slow step learns.

    .. math:: \sum_{i=1}^N E_{q(g)} [\mathrm{ELBO}_i(g)] - \mathrm{KL}(q(g) \,\|\, p(g)), \qquad
        q(g) = f(\mathcal{N}(m, s^2))

    f maps the reals to the support of p. A call draws g from q, records it under its name, and charges nothing; the KL
    is charged once per corpus: training adds B/N of `kl` to the loss of a batch of B. So q(g) belongs to the trained
    model as the decoder's weights do, and a bound of held-out text bounds -log ∫ q(g) p(x | g) dg.

    Args:
        name: under which Pyro traces show the draw.
        family: of p(g), such as ``dist.HalfCauchy``.
        arguments: its parameters, tensors of g's shape.
        start: the median of q at first, inside the support.
        scale: s at first, on the unconstrained side.
    """

    def __init__(
        self, name: str, family: Callable[..., Distribution], *arguments: Tensor, init: Tensor, scale: float = 0.1
    ) -> None:
        super().__init__()
        self.name, self.family, self.number = name, family, len(arguments)
        for index, argument in enumerate(arguments):
            self.register_buffer(f"argument_{index}", argument, persistent=False)
        self.loc = nn.Parameter(biject_to(self.prior().support).inv(init))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, scale).log())
        self.held: Tensor | None = None  # a draw, inside `held`

    def prior(self) -> Any:
        """p(g), every number of g independent."""
        return self.family(*(getattr(self, f"argument_{index}") for index in range(self.number)))

    def forward(self) -> Tensor:
        """A draw from q(g)."""
        return pyro.deterministic(self.name, self.draw() if self.held is None else self.held)

    def draw(self) -> Tensor:
        """g ~ q(g), unseen by Pyro."""
        return biject_to(self.prior().support)(self._unconstrained(self.loc.new_zeros(())))

    @property
    def median(self) -> Tensor:
        """q's median."""
        return biject_to(self.prior().support)(self.loc.detach())

    def kl(self, draws: int = 16) -> Float[Tensor, ""]:
        """KL(q(g) ‖ p(g)) in nats, q's entropy exact and log p at ``draws`` draws."""
        prior, zero = self.prior(), self.loc.new_zeros(draws, *[1] * self.loc.dim())
        with full_precision(self.loc):
            entropy = torch.distributions.Normal(self.loc, self.log_scale.exp(), validate_args=False).entropy()
            place = biject_to(prior.support)
            unconstrained = self._unconstrained(zero)
            g = place(unconstrained)
            log_p = prior.log_prob(g) + place.log_abs_det_jacobian(unconstrained, g)
            return -(entropy + log_p.mean(0)).sum()

    def _unconstrained(self, like: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(like.shape, self.loc.shape)
        return self.loc + self.log_scale.exp() * torch.randn(shape, dtype=like.dtype, device=like.device)


@contextmanager
def fix_global_draws(model: Model, *seed: int) -> Iterator[None]:
    """Inside, what all sequences share is one draw, which depends on the seed alone; what is held already stays."""
    parts = [part for part in model.modules() if isinstance(part, GlobalLatent) and part.held is None]
    with seeded(*seed) if parts else nullcontext(), torch.no_grad():
        for part in parts:
            part.held = part.draw()
    try:
        yield
    finally:
        for part in parts:
            part.held = None


def global_kl(model: Model) -> Float[Tensor, ""] | float:
    """KL(q ‖ p) of everything that all sequences share, in nats per corpus; 0 where nothing is."""
    return sum(part.kl() for part in model.modules() if isinstance(part, GlobalLatent))
