"""The latent sites of a model, from a trace of its prior."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    Transform,
    TransformedDistribution,
    biject_to,
    constraints,
    transform_to,
)
from torch.distributions.transforms import IndependentTransform

from ltm_pyro.contracts import SEQUENCES, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.param_store import no_param_store

Sites = Mapping[str, Distribution]  # the prior's distribution by site name, batch shape (B,)
PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)  # torch and Pyro declare their support real


def prior_sites(model: Model, size: int, covariates_BC: Tensor | None = None) -> Sites:
    """Every latent site inside the plate of sequences, in the order the prior samples it.

    ``covariates_BC`` is what the prior is told of each sequence. While it is traced, every site has its mean as its
    value, so that the distribution of a site that depends on others is the same at every call. Raises `UsageError` if
    p(z) is no density, or one that no guide can reach.
    """
    # the parameters of the prior stay out of Pyro's global store, and outer traces do not record these sites
    with torch.no_grad(), no_param_store(model), poutine.block(), _SubstituteMeans():
        known = () if covariates_BC is None else (covariates_BC,)
        nodes: dict[str, Any] = dict(poutine.trace(model.sample_prior).get_trace(size, *known).nodes)
    sites: Sites = {name: node["fn"] for name, node in nodes.items() if is_local(node)}
    check_density(nodes)
    for name, fn in sites.items():
        if fn.support is not None and fn.support.is_discrete:
            raise UsageError(
                f"Prior site '{name}' is discrete, and a guide needs gradients: have it summed out by "
                f'infer={{"enumerate": "parallel"}}, or marginalise it inside the prior (see MixtureSameFamily).'
            )
    return sites


def check_density(nodes: dict[str, Any]) -> None:
    """Refuses what makes p(z) something else than a density on the declared support of its sites."""
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        family, scale, mask = innermost(node["fn"]), node["scale"], node["mask"]
        if isinstance(scale, Tensor) or scale != 1:
            problem = f"is scaled by {scale} (poutine.scale)"
        elif (mask is not None and mask is not True) or isinstance(family, dist.MaskedDistribution):
            problem = "is masked"
        elif node["is_observed"] and not is_factor(node):
            problem = "has an observed value (obs=), which would be scored as if it were text"
        elif angles := [x for x in _inside(family) if isinstance(x, PERIODIC)]:
            problem = f"is a {type(angles[0]).__name__}, whose values are angles and not the real numbers it declares"
        else:
            continue
        raise UsageError(
            f"Prior site '{name}' {problem}, so that p(z) is no density and no figure would be a bound: change the "
            f"site's distribution instead; observe and scale in the model's forward, outside the prior."
        )


def innermost(fn: Any) -> Any:
    """A distribution without its expansions and declarations of event axes."""
    while isinstance(fn, Independent | dist.torch_distribution.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _inside(fn: Any) -> Iterator[Any]:
    """A distribution, and those that it is made of: what is transformed, the components of a mixture."""
    yield (family := innermost(fn))
    for name in ("base_dist", "component_distribution", "_component_distribution"):
        if isinstance(part := getattr(family, name, None), torch.distributions.Distribution):
            yield from _inside(part)


def is_factor(node: Any) -> bool:
    """Whether a site is a `pyro.factor`: a number added to the log-density."""
    return isinstance(innermost(node["fn"]), dist.Unit)


def prior_factors(model: Model, size: int = 1) -> Mapping[str, Tensor]:
    """The numbers that each `pyro.factor` of a prior adds to log p(z), by name: (B,), at one draw of z."""
    with poutine.block():
        return factors_of(poutine.trace(model.sample_prior).get_trace(size))


def factors_of(trace: Any) -> dict[str, Tensor]:
    """The numbers that each `pyro.factor` of a trace adds to its log-density, by name."""
    factors = {name: x for name, x in trace.nodes.items() if x["type"] == "sample" and is_factor(x)}
    return {name: node["fn"].log_prob(node["value"]) for name, node in factors.items()}


class _SubstituteMeans(Messenger):
    """A Pyro handler that sets every continuous site to its mean, or where that is not finite to where q starts."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or not _in_sequences(msg) or fn.support is None or fn.support.is_discrete:
            return
        with suppress(NotImplementedError):
            center = biject_to(_support(fn))(prior_moments(fn)[0])
            msg["value"] = center
            with suppress(NotImplementedError, AttributeError):
                mean, drawn = fn.mean, fn.sample()
                center = torch.where(center.isfinite(), center, drawn)
                msg["value"] = torch.where(mean.isfinite(), mean, center)


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


def _components(constraint: Any) -> Transform:
    """The bijection to the support of a mixture's components, which torch does not know: NUTS and autoguides ask it."""
    return biject_to(constraint.base_constraint)


for registry in (biject_to, transform_to):
    registry.register(
        type(MixtureSameFamily(Categorical(torch.ones(1)), Normal(torch.zeros(1), 1.0)).support), _components
    )


def is_local(node: Any) -> bool:
    """Whether a node of a trace is a latent site inside the plate of sequences."""
    return node["type"] == "sample" and not node["is_observed"] and _in_sequences(node)


def _in_sequences(node: Any) -> bool:
    return any(frame.name == SEQUENCES for frame in node["cond_indep_stack"])


def unconstrained(fn: Distribution) -> bool:
    """Whether the support of every component is the whole real line."""
    support = _support(fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def prior_moments(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and variance of the prior in unconstrained coordinates: where q starts.

    Where they have no closed form or are not finite, median and squared half distance between the quantiles of 16 and
    84 %, which are the same for a normal; 0 and 1 where these have none either.
    """
    pairs = []
    for find in (_exact_moments, _quantiles):
        with suppress(NotImplementedError, AttributeError):
            pairs.append(find(prior))
    bijection = biject_to(_support(prior))
    like = pairs[0][0] if pairs else bijection.inv(prior.sample())
    shape = prior.batch_shape + coordinate_shape(prior, bijection)
    mean, variance = like.new_zeros(shape), like.new_ones(shape)
    for found_mean, found_variance in reversed(pairs):
        known = found_mean.isfinite() & found_variance.isfinite() & (found_variance > 0)
        mean = torch.where(known, found_mean, mean)
        variance = torch.where(known, found_variance, variance)
    return mean, variance


def coordinate_shape(fn: Distribution, bijection: Transform) -> torch.Size:
    """The event shape of a site in unconstrained coordinates."""
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    by_number = bijection.codomain.event_dim == 0
    return fn.event_shape if by_number else torch.Size(bijection.inverse_shape(fn.event_shape))


def _exact_moments(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and variance in unconstrained coordinates, in closed form; else `NotImplementedError`."""
    if unconstrained(prior):
        return prior.mean, prior.variance
    base = innermost(prior)
    match base:
        case MixtureSameFamily():
            mean, variance = prior_moments(base.component_distribution)
            weight = base.mixture_distribution.probs
            weight = weight.view(*weight.shape, *[1] * (mean.dim() - len(base.component_distribution.batch_shape)))
            axis = len(base.component_distribution.batch_shape) - 1
            center = (weight * mean).sum(axis)
            return center, (weight * (variance + mean**2)).sum(axis) - center**2
        case dist.Gamma():  # the coordinate is log z
            return base.concentration.digamma() - base.rate.log(), torch.polygamma(1, base.concentration)
        case dist.InverseGamma():
            gamma = base.base_dist
            return gamma.rate.log() - gamma.concentration.digamma(), torch.polygamma(1, gamma.concentration)
        case dist.Beta():  # the coordinate is the logit of z
            return _logit_beta(base.concentration1, base.concentration0)
        case dist.Dirichlet():  # the coordinates are those of stick-breaking: logit v + log offset, v a Beta
            alpha = base.concentration
            rest = alpha.flip(-1).cumsum(-1).flip(-1)[..., 1:]
            mean, variance = _logit_beta(alpha[..., :-1], rest)
            return mean + torch.arange(rest.shape[-1], 0, -1, dtype=alpha.dtype, device=alpha.device).log(), variance
        case TransformedDistribution() if isinstance(normal := innermost(base.base_dist), Normal):
            bijection = biject_to(_support(base))
            if base.transforms in ([bijection], getattr(bijection, "parts", None)):
                return normal.mean, normal.variance
    raise NotImplementedError


def _logit_beta(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the logit of a Beta(a, b)."""
    return a.digamma() - b.digamma(), torch.polygamma(1, a) + torch.polygamma(1, b)


def _quantiles(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Median, and squared half distance between the quantiles of 16 and 84 %; else `NotImplementedError`.

    For families whose moments may not exist and whose quantiles torch does not have, their location and scale.
    """
    base: Any = innermost(prior)
    if isinstance(base, dist.StudentT | dist.Stable):
        return base.loc, base.scale**2
    if base.event_shape:
        raise NotImplementedError
    low, median, high = (
        biject_to(_support(base)).inv(base.icdf(torch.tensor(level, dtype=torch.get_default_dtype())))
        for level in (0.1587, 0.5, 0.8413)
    )
    return median, ((high - low) / 2) ** 2
