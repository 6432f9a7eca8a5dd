"""The terms of the ELBO, per sequence and in nats, for any model and any guide.

Shapes: S particles, B sequences.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model


class ElboTerms(NamedTuple):
    """log p(x | z) and KL(q ‖ p) of each sequence, in nats; with particles, a leading axis S."""

    log_likelihood_B: Float[Tensor, "... B"]
    kl_B: Float[Tensor, "... B"]

    @property
    def elbo_B(self) -> Float[Tensor, "... B"]:
        """log p(x | z) − KL, to be maximised."""
        return self.log_likelihood_B - self.kl_B


def elbo_terms(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, particles: int | None = None
) -> ElboTerms:
    r"""One draw (or S draws) of the ELBO's terms.

    .. math:: \mathrm{ELBO} = E_q[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    The KL is exact at every site where torch knows it, and log q − log p at the draw elsewhere. Unlike Pyro's own
    estimators it never waits for the device. Source: arXiv 2502.01567, equation 4.
    """
    q, p = traces(model, guide, batch, local, particles)
    sites = _sampled(p)
    log_likelihood_B = _total(_log_prob(node) for name, node in sites.items() if name not in q.nodes)
    kl_B = _total(_kl(node, sites[name]) for name, node in _latent(q).items())
    return ElboTerms(log_likelihood_B, kl_B.expand_as(log_likelihood_B))


def average_terms(model: Model, guide: Guide, batch: Batch, local: LocalParameters, particles: int) -> ElboTerms:
    """The terms averaged over S draws; one draw carries no particle axis through the decoder."""
    if particles == 1:
        return elbo_terms(model, guide, batch, local)
    return ElboTerms(*(x.mean(0) for x in elbo_terms(model, guide, batch, local, particles)))


def log_weights(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, particles: int
) -> Float[Tensor, "S B"]:
    """log p(x, z) − log q(z | x) at S draws z ~ q, in nats: the importance weights of the evidence."""
    q, p = traces(model, guide, batch, local, particles)
    return _total(map(_log_prob, _sampled(p).values())) - _total(map(_log_prob, _latent(q).values()))


def prior_log_likelihood(model: Model, batch: Batch, particles: int) -> Float[Tensor, "S B"]:
    """log p(x | z) at S draws z ~ p(z), in nats."""
    with pyro.plate(PARTICLES, particles, dim=-2):
        p = prune_subsample_sites(poutine.trace(model).get_trace(batch))
    return _total(_log_prob(node) for node in _sampled(p).values() if node["is_observed"])


def traces(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, particles: int | None
) -> tuple[Trace, Trace]:
    """The guide's trace, and the model's replayed against it; S particles become a plate left of the sequences."""
    if particles is None:
        q = poutine.trace(guide).get_trace(batch, local)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
        return prune_subsample_sites(q), prune_subsample_sites(p)
    with pyro.plate(PARTICLES, particles, dim=-2):
        return traces(model, guide, batch, local, None)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _sampled(trace: Trace) -> dict[str, Any]:
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}


def _latent(trace: Trace) -> dict[str, Any]:
    return {name: node for name, node in _sampled(trace).items() if not node["is_observed"]}


def _log_prob(node: Any) -> Tensor:
    return node["fn"].log_prob(node["value"])


def _kl(q: Any, p: Any) -> Tensor:
    try:
        return kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return _log_prob(q) - _log_prob(p)
