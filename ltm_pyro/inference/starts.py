"""Further starts of q, at draws from the prior: for priors with several modes, of which one fit finds only one.

Shapes: B sequences, M components.
"""

from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import (
    Distribution,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
)

from ltm_pyro.contracts import Batch, Model
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.latent_sites import Sites, bijections, innermost, is_local, prior_moments, unconstrained
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise

SEVERAL = 8  # fits per sequence where the prior may have several modes
POOL = 8  # draws from the prior per further fit, of which the one that explains the text best is the start
SCORING = 16  # draws by which the best of several fits is chosen; figures are then of other draws
NARROW = 0.135  # e⁻²: q's variance at a draw, in variances of the prior, where the draw's component is unknown
OF_LIBRARIES = ("torch.distributions.", "pyro.distributions.")


def has_several_modes(sites: Sites) -> bool:
    """Whether a site may have several modes: a mixture, or a density that is none of torch's and Pyro's families."""
    return not all(_is_unimodal(fn) for fn in sites.values())


def _is_unimodal(fn: Distribution) -> bool:
    fn = innermost(fn)
    if isinstance(fn, TransformedDistribution) and type(fn).__module__.startswith(OF_LIBRARIES):
        known = all(type(x).__module__ == "torch.distributions.transforms" for x in fn.transforms)
        return known and _is_unimodal(fn.base_dist)
    if isinstance(fn, MixtureSameFamily):
        return fn.mixture_distribution.logits.shape[-1] == 1
    declared: bool | None = getattr(fn, "is_unimodal", None)
    if declared is not None:
        return declared
    return type(fn).__module__.startswith(OF_LIBRARIES) and "Mixture" not in type(fn).__name__


def sites_at_a_draw(model: Model, batch: Batch, keys: RowKeys | None) -> Sites:
    """Distributions for `Guide.init` in place of the prior's: every site's q then starts at a draw from the prior.

    Where the site is a mixture, q gets mean and variance of the component that the draw is from; elsewhere the draw
    itself and a narrow variance. A distribution of the user's own says so by a method ``component_at(value)``, which
    returns mean and variance in unconstrained coordinates.
    """
    with torch.no_grad(), no_param_store(model), poutine.block(), RowNoise(keys) if keys else nullcontext():
        nodes: dict[str, Any] = dict(poutine.trace(model.sample_prior).get_trace(*prior_arguments(model, batch)).nodes)
        starts: dict[str, Distribution] = {}
        sites: Sites = {name: node["fn"] for name, node in nodes.items() if is_local(node)}
        for name, (fn, bijection) in bijections(sites).items():
            value = nodes[name]["value"]
            at = bijection.inv(value)
            mean, variance = component_at(fn, value) or (at, NARROW * prior_moments(fn)[1])
            normal = Normal(mean.expand_as(at), variance.sqrt().expand_as(at), validate_args=False)
            start: Any = torch.distributions.Independent(normal, at.dim() - 1, validate_args=False)
            starts[name] = start if unconstrained(fn) else TransformedDistribution(start, bijection)
    return starts


def component_at(fn: Distribution, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance, in unconstrained coordinates, of the component that a value is most probably from.

    None if the distribution does not tell its components.
    """
    fn = innermost(fn)
    if own := getattr(fn, "component_at", None):
        found: tuple[Tensor, Tensor] | None = own(value)
        return found
    if not isinstance(fn, MixtureSameFamily):
        return None
    components, event_dim = fn.component_distribution, len(fn.event_shape)
    log_joint_M = components.log_prob(value.unsqueeze(-1 - event_dim)) + fn.mixture_distribution.logits
    index = log_joint_M.argmax(-1, keepdim=True)

    def of_component(x_M: Tensor) -> Tensor:
        event = x_M.shape[len(components.batch_shape) :]
        x_M = x_M.expand(*log_joint_M.shape, *event)
        at = index.view(*index.shape, *[1] * len(event)).expand(*index.shape, *event)
        return x_M.gather(index.dim() - 1, at).squeeze(index.dim() - 1)

    mean, variance = prior_moments(components)
    return of_component(mean), of_component(variance)
