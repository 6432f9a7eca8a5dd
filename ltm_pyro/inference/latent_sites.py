"""The latent sites of a model, from a trace of its prior."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, Transform, biject_to, constraints

from ltm_pyro.contracts import SEQUENCES, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import no_param_store

Sites = Mapping[str, Distribution]  # the prior's distribution by site name, batch shape (B,)


def prior_sites(model: Model, size: int) -> Sites:
    """Every latent site inside the plate of sequences, in the order the prior samples it.

    While the prior is traced, every site has its mean as its value, so that the distribution of a site that depends on
    others is the same at every call.
    """
    # the parameters of the prior stay out of Pyro's global store, and outer traces do not record these sites
    with torch.no_grad(), no_param_store(model), poutine.block(), _SubstituteMeans():
        nodes: dict[str, Any] = dict(poutine.trace(model.sample_prior).get_trace(size).nodes)
    sites: Sites = {
        name: node["fn"]
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and _in_sequences(node)
    }
    for name, fn in sites.items():
        if fn.support is not None and fn.support.is_discrete:
            raise UsageError(
                f"Prior site '{name}' is discrete, and a guide needs gradients: "
                f"marginalise it inside the prior (see MixtureSameFamily)."
            )
    return sites


class _SubstituteMeans(Messenger):
    """A Pyro handler that sets every continuous site to its mean, if it has one."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or not _in_sequences(msg) or fn.support is None or fn.support.is_discrete:
            return
        with suppress(NotImplementedError, AttributeError):
            msg["value"] = torch.where(fn.mean.isfinite(), fn.mean, fn.sample())


def bijections(sites: Sites) -> dict[str, tuple[Distribution, Transform]]:
    """Every site's distribution, and the bijection from unconstrained coordinates to its support."""
    pairs = {}
    for name, fn in sites.items():
        try:
            pairs[name] = (fn, biject_to(_support(fn)))
        except NotImplementedError:
            raise UsageError(
                f"No guide reaches the support of prior site '{name}', {fn.support}: sample an unconstrained "
                f"variable and transform it inside the prior."
            ) from None
    return pairs


def _support(fn: Distribution) -> constraints.Constraint | None:
    """A distribution's support; for a mixture, the support of its components."""
    if isinstance(fn, Independent):
        return constraints.independent(_support(fn.base_dist), fn.reinterpreted_batch_ndims)
    return getattr(fn.support, "base_constraint", fn.support) if isinstance(fn, MixtureSameFamily) else fn.support


def _in_sequences(node: Any) -> bool:
    return any(frame.name == SEQUENCES for frame in node["cond_indep_stack"])


def unconstrained(fn: Distribution) -> bool:
    """Whether the support of every component is the whole real line."""
    support = _support(fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def prior_moments(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and variance of the prior in unconstrained coordinates; 0 and 1 if they have no closed form."""
    if unconstrained(prior):
        try:
            mean, variance = prior.mean, prior.variance
        except NotImplementedError:
            mean = variance = torch.full_like(prior.sample(), torch.nan)
        known = mean.isfinite() & variance.isfinite() & (variance > 0)
        return torch.where(known, mean, 0.0), torch.where(known, variance, 1.0)
    sample = biject_to(_support(prior)).inv(prior.sample())
    return torch.zeros_like(sample), torch.ones_like(sample)
