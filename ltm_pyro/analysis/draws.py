"""Draws from q with log q(z | x), log p(z) and log p(x | z): what every diagnostic is computed from.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.elbo import sum_log_probs
from ltm_pyro.inference.estimators import TOKENS_AT_ONCE
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.nn.cross_entropy import token_nats
from ltm_pyro.nn.token_categorical import TokenCategorical

Sites = dict[str, Tensor]  # name of a latent site -> its draws (S, B, *event)


class LogDensities(NamedTuple):
    """The thoughts z at draws of the prior's latent sites, with log p(z) and log p(x_t | x_<t, z), in nats."""

    z_SBLKD: Float[Tensor, "S B L K D"]
    log_prior_SB: Float[Tensor, "S B"]
    log_likelihood_SBT: Float[Tensor, "S B T"]


class GuideDraws(NamedTuple):
    """Draws of every latent site from q, log q(z | x) in nats, and the model's log-densities at the draws."""

    sites: Sites
    log_q_SB: Float[Tensor, "S B"]
    densities: LogDensities

    @property
    def log_ratio_SB(self) -> Float[Tensor, "S B"]:
        """log p(z) − log q(z | x), in nats."""
        return self.densities.log_prior_SB - self.log_q_SB

    @property
    def log_weights_SB(self) -> Float[Tensor, "S B"]:
        """The log importance weights log p(x, z) − log q(z | x), in nats."""
        return self.log_ratio_SB + self.densities.log_likelihood_SBT.sum(-1)


def draw_from_guide(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, samples: int, keys: RowKeys | None = None
) -> GuideDraws:
    """S draws z ~ q(z | x), computed in chunks that fit in memory.

    Args:
        keys: of the sequences' own random streams; by default torch's generator.
    """
    size = max(1, TOKENS_AT_ONCE // batch.inputs_BT.numel())
    chunks = []
    for done in range(0, samples, size):
        names = prior_sites(model, 1)
        noise = RowNoise(keys, done) if keys else nullcontext()
        with torch.no_grad(), no_param_store(), noise, pyro.plate(PARTICLES, min(size, samples - done), dim=-2):
            q = poutine.trace(guide).get_trace(batch, local)
        sites = {name: cast(Tensor, q.nodes[name]["value"]) for name in names}
        with torch.no_grad():
            chunks.append(GuideDraws(sites, sum_log_probs(q, names), log_densities(model, batch, sites)))
    densities = zip(*(chunk.densities for chunk in chunks), strict=True)
    return GuideDraws(
        {name: torch.cat([chunk.sites[name] for chunk in chunks]) for name in chunks[0].sites},
        torch.cat([chunk.log_q_SB for chunk in chunks]),
        LogDensities._make(torch.cat(x) for x in densities),
    )


def log_densities(model: Model, batch: Batch, sites: Sites) -> LogDensities:
    """log p(z) and log p(x | z) at given draws of all latent sites, without gradients."""
    samples = len(next(iter(sites.values())))
    with no_param_store(), torch.no_grad(), pyro.plate(PARTICLES, samples, dim=-2):
        p = poutine.trace(poutine.condition(model.sample_prior, data=sites)).get_trace(*prior_arguments(model, batch))
    z_SBLKD = cast(Tensor, p.nodes["_RETURN"]["value"])
    return LogDensities(z_SBLKD, sum_log_probs(p, sites), token_log_likelihood(model, batch, z_SBLKD))


def token_log_likelihood(model: Model, batch: Batch, z_SBLKD: Float[Tensor, "*S B L K D"]) -> Float[Tensor, "*S B T"]:
    """log p(x_t | x_<t, z) of every token, in nats; 0 at padding. `UsageError` if p(x | z) does not factorise so."""
    with no_param_store(), torch.no_grad():
        tokens: Any = model.observation(z_SBLKD, batch)
        value_BT = model.observed(batch)
        if isinstance(tokens, TokenCategorical):
            return -(token_nats(tokens.hidden_BTD, tokens.embedding_VD, value_BT) * tokens.mask_BT)
        if hasattr(tokens, "base_dist"):
            return tokens.base_dist.log_prob(value_BT)
    raise UsageError(f"{type(tokens).__name__} has no log-probability per token: the analysis needs p(x_t | x_<t, z).")


def evenly_spaced(size: int, most: int) -> Int[np.ndarray, " N"]:
    """At most ``most`` different indices from 0 to ``size`` − 1, evenly spaced from first to last."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int))
