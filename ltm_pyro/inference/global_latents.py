"""Global latent variables: random variables shared by all sequences, each with a variational posterior."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from ltm_pyro.contracts import Model
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.utils.rng import seeded


class GlobalLatent(PyroModule):
    r"""A global random variable g of a prior, with a variational posterior q(g) that the slow step trains.

    .. math:: \sum_{i=1}^N E_{q(g)} [\mathrm{ELBO}_i(g)] - \mathrm{KL}(q(g) \,\|\, p(g)), \qquad
        q(g) = f(\mathcal{N}(m, s^2))

    f maps the reals to the support of p. A call draws g from q and records it as a deterministic site, without a
    log-density. The KL counts once per corpus: training adds B/N of `kl` to the loss of a batch of B sequences. q(g) is
    therefore a part of the trained model, like the decoder's weights, and a bound on held-out text is a bound on
    −log ∫ q(g) p(x | g) dg.

    Args:
        name: name of the deterministic site.
        family: class of the distribution p(g), such as ``dist.HalfCauchy``.
        arguments: parameters of p(g), tensors of g's shape.
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
        """p(g), with independent components."""
        return self.family(*(getattr(self, f"argument_{index}") for index in range(self.number)))

    def forward(self) -> Tensor:
        """A draw from q(g), or the value that `fix_global_draws` has set."""
        fixed = _fixed.get({}).get(self)
        return pyro.deterministic(self.name, self.draw() if fixed is None else fixed)

    def draw(self) -> Tensor:
        """g ~ q(g), without a Pyro site."""
        return biject_to(self.prior().support)(self._unconstrained(self.loc.new_zeros(())))

    @property
    def median(self) -> Tensor:
        """The median of q(g)."""
        return biject_to(self.prior().support)(self.loc.detach())

    def kl(self, draws: int = 16) -> Float[Tensor, ""]:
        """KL(q(g) ‖ p(g)) in nats, with q's exact entropy and log p averaged over ``draws`` draws."""
        prior, zeros = self.prior(), self.loc.new_zeros(draws, *[1] * self.loc.dim())
        with full_precision(self.loc):
            entropy = torch.distributions.Normal(self.loc, self.log_scale.exp(), validate_args=False).entropy()
            transform = biject_to(prior.support)
            unconstrained = self._unconstrained(zeros)
            g = transform(unconstrained)
            log_p = prior.log_prob(g) + transform.log_abs_det_jacobian(unconstrained, g)
            return -(entropy + log_p.mean(0)).sum()

    def _unconstrained(self, like: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(like.shape, self.loc.shape)
        return self.loc + self.log_scale.exp() * torch.randn(shape, dtype=like.dtype, device=like.device)


_fixed: ContextVar[dict[GlobalLatent, Tensor]] = ContextVar("fixed_global_draws")


@contextmanager
def fix_global_draws(model: Model, *seed: int) -> Iterator[dict[str, Tensor]]:
    """Inside, every global latent variable of a model has one value, which depends on the random seed only.

    Of nested calls, the outermost one sets the values. Yields the values by name. This is no Pyro handler, because
    `pyro.infer.MCMC` and `pyro.infer.Importance` hide outer handlers from the model.
    """
    outer = _fixed.get({})
    latents = [part for part in model.modules() if isinstance(part, GlobalLatent)]
    new = [latent for latent in latents if latent not in outer]
    with seeded(*seed) if new else nullcontext(), torch.no_grad():
        draws = outer | {latent: latent.draw() for latent in new}
    token = _fixed.set(draws)
    try:
        yield {latent.name: draws[latent] for latent in latents}
    finally:
        _fixed.reset(token)


def fix_draws_by_keys(model: Model, keys: RowKeys | None) -> AbstractContextManager[Any]:
    """`fix_global_draws` with the random seed of the keys; nothing without keys."""
    return nullcontext() if keys is None else fix_global_draws(model, keys.seed)


def global_draws(model: Model) -> list[Tensor]:
    """The values that `fix_global_draws` has set for a model."""
    fixed = _fixed.get({})
    return [fixed[part] for part in model.modules() if part in fixed]


def global_kl(model: Model) -> Float[Tensor, ""] | float:
    """KL(q ‖ p) of all global latent variables, in nats per corpus; 0 if there are none."""
    return sum(part.kl() for part in model.modules() if isinstance(part, GlobalLatent))
