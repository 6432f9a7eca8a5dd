"""What the thoughts carry, in nats: KL by thought, active units, mutual information and the aggregated posterior.

Shapes: N sequences, S draws, D coordinates.
"""

import math
from typing import NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.analysis.classifiers import FOLDS, Accuracy, c2st
from ltm_pyro.analysis.draws import log_density
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.two_sample import Discrepancy, mmd
from ltm_pyro.contracts import PARTICLES, Batch, Guide, Model, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import no_param_store
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.utils.statistics import standard_error

ACTIVE = 0.01  # variance of the posterior's mean over sequences, in the prior's (Burda et al. 2016, arXiv 1509.00519)
MOST_DRAWS = 16
ROWS = 32  # draws whose densities under every q are computed together


class Decomposition(NamedTuple):
    """The average KL and its two parts, in nats, each with its Monte-Carlo standard error over sequences."""

    average_kl: float
    mutual_information: float
    marginal_kl: float
    average_kl_stderr: float
    mutual_information_stderr: float
    marginal_kl_stderr: float
    most: float  # log N: no estimate from N sequences can say more


def active_units(posterior: Posterior) -> xr.DataArray:
    """How many coordinates of each thought move with the text: Var_x(E_q[z]) > 0.01 prior variances.

    Means that were taken from draws differ by chance as well, which is taken off.
    """
    _need(posterior, 2, "Active units")
    scale = posterior.group("prior")["z"].std(("chain", "draw"))
    by_chance = (posterior.stats["mcse_mean"] ** 2).mean("sequence")
    spread = posterior.stats["mean"].var("sequence", ddof=1) - by_chance
    return (spread / scale**2 > ACTIVE).sum("dim")


def decompose(model: Model, guide: Guide, posterior: Posterior) -> Decomposition:
    r"""The average KL of N sequences as mutual information and marginal KL (Hoffman & Johnson 2016).

    .. math:: \tfrac1N \sum_i \mathrm{KL}(q(z \mid x_i) \,\|\, p(z)) = I_q(x; z) + \mathrm{KL}(\bar q(z) \,\|\, p(z)),
        \qquad \bar q(z) = \tfrac1N \sum_i q(z \mid x_i)

    The KL to the prior that pays for information about the text is the first part; the second is what a prior that fits
    the aggregated posterior would save.
    """
    _need(posterior, 2, "The decomposition")
    posterior.check_normalised()
    draws = min(MOST_DRAWS, posterior.z.sizes["draw"])
    log_q_SN = posterior.stats.log_q.values[0, :draws]
    log_p_SN = posterior.stats.log_prior.values[0, :draws]
    log_aggregated_SN = np.stack([aggregated_density(model, guide, posterior, draw) for draw in range(draws)])
    parts = (log_q_SN - log_p_SN, log_q_SN - log_aggregated_SN, log_aggregated_SN - log_p_SN)
    kl_N, information_N, marginal_N = (part.mean(0) for part in parts)
    return Decomposition(
        average_kl=float(kl_N.mean()),
        mutual_information=float(information_N.mean()),
        marginal_kl=float(marginal_N.mean()),
        average_kl_stderr=float(standard_error(kl_N)),
        mutual_information_stderr=float(standard_error(information_N)),
        marginal_kl_stderr=float(standard_error(marginal_N)),
        most=math.log(posterior.size),
    )


def aggregated_density(model: Model, guide: Guide, posterior: Posterior, draw: int) -> Float[np.ndarray, " N"]:
    """log (1/N) Σ_j q(z_i | x_j) at one draw z_i of each sequence i, in nats."""
    local, batch = posterior.local(), observed(posterior)
    own = posterior.group("posterior")
    sites = {
        name: torch.from_numpy(own[f"{name}_site" if f"{name}_site" in own else name].values[0, draw])
        for name in prior_sites(model, 1)
    }
    rows = [
        _density(guide, batch, local, {name: x[first : first + ROWS] for name, x in sites.items()})
        for first in range(0, posterior.size, ROWS)
    ]
    return (torch.cat(rows).logsumexp(1) - math.log(posterior.size)).numpy()


def _density(guide: Guide, batch: Batch, local: dict[str, Tensor], sites: dict[str, Tensor]) -> Float[Tensor, "M N"]:
    """log q(z_i | x_j) of every draw i under every sequence j."""
    count = len(next(iter(sites.values())))
    data = {name: x[:, None].expand(count, batch.size, *x.shape[1:]) for name, x in sites.items()}
    with no_param_store(), torch.no_grad(), pyro.plate(PARTICLES, count, dim=-2):
        trace = poutine.trace(poutine.condition(guide, data=data)).get_trace(batch, local)
    return log_density(trace, sites)


def observed(posterior: Posterior, start_token: int = 0) -> Batch:
    """The batch that the posterior is of."""
    tokens_BT = torch.from_numpy(posterior.group("observed_data")["tokens"].values.astype(np.int64))
    lengths_B = (tokens_BT >= 0).sum(1)
    return make_batch(tokens_BT.clamp(min=0), lengths_B, start_token)


class Aggregate(NamedTuple):
    """One draw of each sequence's q against as many draws of the prior."""

    c2st: Accuracy
    mmd: Discrepancy


def aggregate(posterior: Posterior, seed: int = 0) -> Aggregate:
    """Is the aggregated posterior the prior? Where it is not, what is drawn from the prior is not what was learned."""
    _need(posterior, 4 * FOLDS, "The aggregated posterior")
    q_ND = posterior.draws.values[:, 0]
    prior = posterior.group("prior")["z"].values[0].reshape(-1, q_ND.shape[1])
    if len(prior) < len(q_ND):
        q_ND = q_ND[np.random.default_rng(seed).permutation(len(q_ND))[: len(prior)]]
    return Aggregate(c2st(q_ND, prior[: len(q_ND)], seed), mmd(q_ND, prior[: len(q_ND)], seed))


def _need(posterior: Posterior, least: int, what: str) -> None:
    if posterior.size < least:
        raise UsageError(f"{what} needs at least {least} sequences, got {posterior.size}: infer from more texts.")
