"""Draws from q and their densities: the raw material of every diagnostic.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import no_param_store
from ltm_pyro.inference.estimators import TOKENS_AT_ONCE
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.nn.cross_entropy import token_nats
from ltm_pyro.nn.token_categorical import TokenCategorical

Sites = dict[str, Tensor]  # a latent site's draws, each (S, B, *event)


class Described(NamedTuple):
    """The thoughts at draws of the prior's sites, and their log-densities in nats."""

    z_SBLKD: Float[Tensor, "S B L K D"]
    log_prior_SB: Float[Tensor, "S B"]
    log_likelihood_SBT: Float[Tensor, "S B T"]


class Drawn(NamedTuple):
    """Draws of every latent site, their log-density under q and what the model says of them."""

    sites: Sites
    log_q_SB: Float[Tensor, "S B"]
    described: Described


def draw(model: Model, guide: Guide, batch: Batch, local: LocalParameters, samples: int) -> Drawn:
    """S draws z ~ q(z | x), in chunks that fit in memory."""
    chunk = max(1, TOKENS_AT_ONCE // batch.inputs_BT.numel())
    counts = [min(chunk, samples - done) for done in range(0, samples, chunk)]
    with torch.no_grad():
        return _joined([_chunk(model, guide, batch, local, count) for count in counts])


def _chunk(model: Model, guide: Guide, batch: Batch, local: LocalParameters, count: int) -> Drawn:
    names = prior_sites(model, 1)
    with no_param_store(), pyro.plate(PARTICLES, count, dim=-2):
        q = poutine.trace(guide).get_trace(batch, local)
    sites = {name: cast(Tensor, q.nodes[name]["value"]) for name in names}
    return Drawn(sites, log_density(q, names), describe(model, batch, sites))


def _joined(chunks: list[Drawn]) -> Drawn:
    sites = {name: torch.cat([chunk.sites[name] for chunk in chunks]) for name in chunks[0].sites}
    described = zip(*(chunk.described for chunk in chunks), strict=True)
    log_q_SB = torch.cat([chunk.log_q_SB for chunk in chunks])
    return Drawn(sites, log_q_SB, Described._make(torch.cat(x) for x in described))


def describe(model: Model, batch: Batch, sites: Sites) -> Described:
    """What the model says of draws of its latent sites."""
    samples = len(next(iter(sites.values())))
    with no_param_store(), torch.no_grad(), pyro.plate(PARTICLES, samples, dim=-2):
        p = poutine.trace(poutine.condition(model.sample_prior, data=sites)).get_trace(batch.size)
    z_SBLKD = cast(Tensor, p.nodes["_RETURN"]["value"])
    return Described(z_SBLKD, log_density(p, sites), token_log_likelihood(model, batch, z_SBLKD))


def token_log_likelihood(model: Model, batch: Batch, z_SBLKD: Float[Tensor, "*S B L K D"]) -> Float[Tensor, "*S B T"]:
    """log p(x_t | x_<t, z) of every token in nats; 0 at padding."""
    with no_param_store(), torch.no_grad():
        return _by_token(model.observation(z_SBLKD, batch), model.observed(batch))


def _by_token(tokens: Any, value_BT: Tensor) -> Tensor:
    if isinstance(tokens, TokenCategorical):
        return -(token_nats(tokens.hidden_BTD, tokens.embedding_VD, value_BT) * tokens.mask_BT)
    if not hasattr(tokens, "base_dist"):
        raise UsageError(f"{type(tokens).__name__} says nothing of single tokens: the analysis needs p(x_t | x_<t, z).")
    return tokens.base_dist.log_prob(value_BT)


def log_density(trace: Trace, sites: Iterable[str]) -> Float[Tensor, "*S B"]:
    """The summed log-density at some of a trace's sites, in nats."""
    with pyro.validation_enabled(False):
        trace.compute_log_prob(lambda name, _: name in sites)
    return reduce(torch.add, (trace.nodes[name]["log_prob"] for name in sites))


def evenly(size: int, most: int) -> Int[np.ndarray, " N"]:
    """At most so many of ``size`` places, evenly spread over all of them."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int))
