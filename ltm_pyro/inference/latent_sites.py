"""The latent sites of a model, from a trace of its prior."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, Transform, biject_to, constraints

from ltm_pyro.contracts import SEQUENCES, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.param_store import no_param_store

Sites = Mapping[str, Distribution]  # the prior's distribution by site name, batch shape (B,)
PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)  # torch and Pyro declare their support real


def prior_sites(model: Model, size: int) -> Sites:
    """Every latent site inside the plate of sequences, in the order the prior samples it.

    While the prior is traced, every site has its mean as its value, so that the distribution of a site that depends on
    others is the same at every call. Raises `UsageError` if p(z) is no density, or one that no guide can reach.
    """
    # the parameters of the prior stay out of Pyro's global store, and outer traces do not record these sites
    with torch.no_grad(), no_param_store(model), poutine.block(), _SubstituteMeans():
        nodes: dict[str, Any] = dict(poutine.trace(model.sample_prior).get_trace(size).nodes)
    sites: Sites = {
        name: node["fn"]
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and _in_sequences(node)
    }
    _check_density(nodes)
    for name, fn in sites.items():
        if fn.support is not None and fn.support.is_discrete:
            raise UsageError(
                f"Prior site '{name}' is discrete, and a guide needs gradients: "
                f"marginalise it inside the prior (see MixtureSameFamily)."
            )
    return sites


def _check_density(nodes: dict[str, Any]) -> None:
    """Refuses what makes p(z) something else than a density on the declared support of its sites."""
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        family, scale, mask = _base(node["fn"]), node["scale"], node["mask"]
        if isinstance(scale, Tensor) or scale != 1:
            problem = f"is scaled by {scale} (poutine.scale)"
        elif (mask is not None and mask is not True) or isinstance(family, dist.MaskedDistribution):
            problem = "is masked"
        elif node["is_observed"] and not is_factor(node):
            problem = "has an observed value (obs=), which would be scored as if it were text"
        elif isinstance(family, PERIODIC):
            problem = f"is a {type(family).__name__}, whose values are angles and not the real numbers it declares"
        else:
            continue
        raise UsageError(
            f"Prior site '{name}' {problem}, so that p(z) is no density and no figure would be a bound: change the "
            f"site's distribution instead; observe and scale in the model's forward, outside the prior."
        )


def _base(fn: Any) -> Any:
    """A distribution without its expansions and declarations of event axes."""
    while isinstance(fn, Independent | dist.torch_distribution.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_factor(node: Any) -> bool:
    """Whether a site is a `pyro.factor`: a number added to the log-density."""
    return isinstance(_base(node["fn"]), dist.Unit)


def prior_factors(model: Model, size: int = 1) -> Mapping[str, Tensor]:
    """The numbers that each `pyro.factor` of a prior adds to log p(z), by name: (B,), at one draw of z."""
    with poutine.block():
        return factors_of(poutine.trace(model.sample_prior).get_trace(size))


def factors_of(trace: Any) -> dict[str, Tensor]:
    """The numbers that each `pyro.factor` of a trace adds to its log-density, by name."""
    factors = {name: x for name, x in trace.nodes.items() if x["type"] == "sample" and is_factor(x)}
    return {name: node["fn"].log_prob(node["value"]) for name, node in factors.items()}


class _SubstituteMeans(Messenger):
    """A Pyro handler that sets every continuous site to its mean, if it has one."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or not _in_sequences(msg) or fn.support is None or fn.support.is_discrete:
            return
        with suppress(NotImplementedError, AttributeError):
            msg["value"] = torch.where(fn.mean.isfinite(), fn.mean, fn.sample())


def check_coordinates(guide: object, sites: Sites) -> None:
    """Raises `UsageError` if a site has no coordinates, as without thoughts (K = 0): not every family can be empty."""
    if empty := [name for name, fn in sites.items() if not fn.event_shape.numel()]:
        raise UsageError(
            f"{type(guide).__name__} needs thoughts, but the site '{empty[0]}' has none (K = 0): use MeanField, or "
            f"give the decoder thoughts."
        )


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
