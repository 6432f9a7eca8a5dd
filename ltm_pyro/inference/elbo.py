"""The terms of the ELBO, per sequence and in nats, for any model and any guide.

Shapes: S particles, B sequences.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.antithetic import Antithetic
from ltm_pyro.nn.precision import full_precision


class ElboTerms(NamedTuple):
    """log p(x | z) and KL(q ‖ p) of each sequence, in nats; with particles, a leading axis S."""

    log_likelihood_B: Float[Tensor, "... B"]
    kl_B: Float[Tensor, "... B"]

    @property
    def elbo_B(self) -> Float[Tensor, "... B"]:
        """log p(x | z) − KL, to be maximised."""
        return self.log_likelihood_B - self.kl_B


@contextmanager
def no_param_store() -> Iterator[None]:
    """Inside, no parameter stays in Pyro's global store, and no argument is validated.

    Validation waits for the device at every site, and lets one sequence's non-finite parameters stop all the others.
    """
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


class Draws(NamedTuple):
    """How the ELBO is drawn: S particles or one without an axis, mirrored or not, KL exact or along the path."""

    particles: int | None = None
    antithetic: bool = False
    path: bool = False


@no_param_store()
def elbo_terms(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, draws: Draws | None = None
) -> ElboTerms:
    r"""One draw (or S draws) of the ELBO's terms.

    .. math:: \mathrm{ELBO} = E_q[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    The KL is exact at every site where torch knows it, and log q − log p at the draw elsewhere; with ``draws.path``
    it is the latter everywhere, q's parameters held fixed inside log q. Unlike Pyro's own estimators it never waits
    for the device. Source: arXiv 2502.01567, equation 4.
    """
    return _terms(model, guide, batch, local, draws or Draws())


def _terms(model: Model, guide: Guide, batch: Batch, local: LocalParameters, draws: Draws) -> ElboTerms:
    q, p = traces(model, guide, batch, local, draws)
    prior, posterior = _sampled(p), _latent(q)
    log_likelihood_B = _log_likelihood(prior, posterior)
    if draws.path:
        posterior = _latent(_replayed(guide, q, batch, {name: x.detach() for name, x in local.items()}, draws))
    kl = _sampled_kl if draws.path else _kl
    with full_precision(batch.inputs_BT):
        kl_B = _total(kl(node, prior[name]) for name, node in posterior.items())
    return ElboTerms(log_likelihood_B, kl_B.expand_as(log_likelihood_B))


def average_terms(model: Model, guide: Guide, batch: Batch, local: LocalParameters, draws: Draws) -> ElboTerms:
    """The terms averaged over S draws, inside `quiet`; one draw carries no particle axis through the decoder."""
    if draws.particles == 1:
        return _terms(model, guide, batch, local, draws._replace(particles=None))
    return ElboTerms(*(x.mean(0) for x in _terms(model, guide, batch, local, draws)))


@no_param_store()
def log_weights(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, particles: int
) -> Float[Tensor, "S B"]:
    """log p(x, z) − log q(z | x) at S draws z ~ q, in nats: the importance weights of the evidence."""
    return weigh(*traces(model, guide, batch, local, Draws(particles)))


def weigh(q: Trace, p: Trace) -> Float[Tensor, "... B"]:
    """log p(x, z) − log q(z | x) of each sequence at the guide's draw, in nats."""
    prior, posterior = _sampled(p), _latent(q)
    log_likelihood_B = _log_likelihood(prior, posterior)
    with full_precision(log_likelihood_B):
        return log_likelihood_B + _total(_log_prob(prior[name]) - _log_prob(node) for name, node in posterior.items())


@no_param_store()
def prior_log_likelihood(model: Model, batch: Batch, particles: int) -> Float[Tensor, "S B"]:
    """log p(x | z) at S draws z ~ p(z), in nats."""
    with pyro.plate(PARTICLES, particles, dim=-2):
        p = poutine.trace(model).get_trace(batch)
    return _total(_log_prob(node) for node in _sampled(p).values() if node["is_observed"])


def missing_bound(model: Model, guide: Guide) -> str | None:
    """Why the ELBO of this pair bounds no evidence; None where it does, or where a normaliser has been estimated."""
    if not guide.has_density:
        return f"{type(guide).__name__} has no density"
    if any(x.isnan() for x in normalisers(model)):
        return "the prior's normaliser is unknown"
    return None


def normalisers(model: Model) -> list[Tensor]:
    """log C of every unnormalised prior of a model, nan where it is not estimated."""
    found = (getattr(part, "log_normaliser", None) for part in model.modules())
    return [x for x in found if isinstance(x, Tensor)]


def traces(model: Model, guide: Guide, batch: Batch, local: LocalParameters, draws: Draws) -> tuple[Trace, Trace]:
    """The guide's trace, and the model's replayed against it, inside `quiet`.

    S particles become a plate left of the sequences.
    """
    mirror = Antithetic() if draws.antithetic else nullcontext()
    with full_precision(batch.inputs_BT), mirror, _particles(draws), poutine.trace() as q:  # mirror sees the plate
        guide(batch, local)
    with _particles(draws), poutine.trace() as p, poutine.replay(trace=q.trace):
        model(batch)
    check_sites(_latent(q.trace), _latent(p.trace))
    return q.trace, p.trace


def check_sites(guide: Iterable[str], model: Iterable[str]) -> None:
    """Refuses a guide that misses a latent site of the model, or has one too many."""
    guide, model = set(guide), set(model)
    if missing := sorted(model - guide):
        raise UsageError(
            f"The guide has no site '{missing[0]}', which the model samples; its sites are {sorted(guide)}. "
            f"Sample it in the guide, or marginalise it in the prior."
        )
    if extra := sorted(guide - model):
        raise UsageError(
            f"The guide samples '{extra[0]}', which the model does not have; the model's sites are {sorted(model)}. "
            f"Rename it, or remove it from the guide."
        )


def _replayed(guide: Guide, q: Trace, batch: Batch, local: LocalParameters, draws: Draws) -> Trace:
    with full_precision(batch.inputs_BT), _particles(draws):
        return poutine.trace(poutine.replay(guide, trace=q)).get_trace(batch, local)


def _particles(draws: Draws) -> Any:
    return nullcontext() if draws.particles is None else pyro.plate(PARTICLES, draws.particles, dim=-2)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _log_likelihood(prior: dict[str, Any], posterior: Iterable[str]) -> Tensor:
    return _total(_log_prob(node) for name, node in prior.items() if name not in posterior)


def _sampled(trace: Trace) -> dict[str, Any]:
    nodes = trace.nodes.items()
    return {name: node for name, node in nodes if node["type"] == "sample" and not site_is_subsample(node)}


def _latent(trace: Trace) -> dict[str, Any]:
    return {name: node for name, node in _sampled(trace).items() if not node["is_observed"]}


def _log_prob(node: Any) -> Tensor:
    return scale_and_mask(node["fn"].log_prob(node["value"]), node["scale"], node["mask"])


def _sampled_kl(q: Any, p: Any) -> Tensor:
    return _log_prob(q) - _log_prob(p)


def _kl(q: Any, p: Any) -> Tensor:
    try:
        return scale_and_mask(kl_divergence(q["fn"], p["fn"]), p["scale"], p["mask"])
    except NotImplementedError:
        return _sampled_kl(q, p)
