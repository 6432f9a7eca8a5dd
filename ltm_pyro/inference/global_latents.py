"""Global latent variables: random variables that all sequences share, with a variational posterior of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from ltm_pyro.contracts import Model
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.utils.rng import seeded


class GlobalLatent(PyroModule):
    r"""A global random variable g of a prior, with a posterior q(g) of its own that the slow step learns.

    .. math:: \sum_{i=1}^N E_{q(g)} [\mathrm{ELBO}_i(g)] - \mathrm{KL}(q(g) \,\|\, p(g)), \qquad
        q(g) = f(\mathcal{N}(m, s^2))

    f maps the reals to the support of p. A call draws g from q and records it under its name, with no log-density. The
    KL counts once per corpus: training adds B/N of `kl` to the loss of a batch of B. So q(g) belongs to the trained
    model as the decoder's weights do, and a bound of held-out text bounds −log ∫ q(g) p(x | g) dg.

    Args:
        name: of the site that shows the draw in Pyro's traces.
        family: of p(g), such as ``dist.HalfCauchy``.
        arguments: its parameters, tensors of g's shape.
        init: the initial median of q, inside the support.
        scale: the initial s, in unconstrained coordinates.
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

    def prior(self) -> Any:
        """p(g), every number of g independent."""
        return self.family(*(getattr(self, f"argument_{index}") for index in range(self.number)))

    def forward(self) -> Tensor:
        """A draw from q(g), or the value that `fix_global_draws` has fixed."""
        return pyro.deterministic(self.name, _draw(self, name=self.name))

    def draw(self) -> Tensor:
        """g ~ q(g), without a Pyro site."""
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


@effectful(type="global_latent")
def _draw(latent: GlobalLatent) -> Tensor:
    """A draw that Pyro handlers see as a statement of their own type, so that `FixGlobalDraws` can give its value."""
    return latent.draw()


class FixGlobalDraws(Messenger):
    """A Pyro handler under which every global latent variable named in ``draws`` has the given value."""

    def __init__(self, draws: dict[str, Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def _pyro_global_latent(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.draws:  # of nested handlers the outermost comes last, and decides
            msg["value"], msg["done"] = self.draws[msg["name"]], True


@contextmanager
def fix_global_draws(model: Model, *seed: int) -> Iterator[dict[str, Tensor]]:
    """Inside, every global latent variable of a model has one value, drawn from the random seed alone.

    Inside another `fix_global_draws` the outer one decides. Yields the values by name, for what hides outer handlers
    from the model, as `pyro.infer.MCMC` does: wrap the model in `FixGlobalDraws` there.
    """
    latents = [part for part in model.modules() if isinstance(part, GlobalLatent)]
    with seeded(*seed) if latents else nullcontext(), torch.no_grad():
        draws = {latent.name: latent.draw() for latent in latents}
    with FixGlobalDraws(draws) if draws else nullcontext():
        yield {latent.name: _draw(latent, name=latent.name) for latent in latents}


def global_kl(model: Model) -> Float[Tensor, ""] | float:
    """KL(q ‖ p) of all global latent variables, in nats per corpus; 0 if there are none."""
    return sum(part.kl() for part in model.modules() if isinstance(part, GlobalLatent))
