"""The information in the thoughts: active units, mutual information and the aggregated posterior.

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

from ltm_pyro.analysis.classifiers import TwoSample, c2st
from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.analysis.two_sample import Discrepancy, mmd
from ltm_pyro.contracts import PARTICLES, Batch, Guide, Model, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import with_labels
from ltm_pyro.inference.elbo import sum_log_probs
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import clustered_mean

ACTIVE = 0.01  # variance of posterior means over prior variance (Burda et al. 2016, arXiv 1509.00519)
MOST_DRAWS = 16
FEWEST = 20  # sequences for the two-sample tests
ROWS = 32  # draws per chunk; each is evaluated under all N q


class Decomposition(NamedTuple):
    """The average KL and its two parts, in nats, each with its standard error over documents.

    The index of the text is one of the N given ones. As estimates for the population that they come from, the mutual
    information is too low and the marginal KL too high, by the same amount. ``saturated`` says that draws tell the N
    texts apart (the mutual information is within log 2 of log N, and above half of it): then N texts say only that
    there is more.
    """

    average_kl: float
    mutual_information: float
    marginal_kl: float
    average_kl_stderr: float
    mutual_information_stderr: float
    marginal_kl_stderr: float
    most: float  # log N, the largest estimate that N sequences allow
    saturated: bool


def active_units(posterior: Posterior) -> xr.DataArray:
    """The number of coordinates of each thought that depend on the text: Var_x(E_q[z]) > 0.01 prior variances.

    The Monte-Carlo variance of means that are estimated from draws is subtracted.
    """
    _check_size(posterior, 2, "Active units")
    scale = posterior.group("prior")["z"].std(("chain", "draw"))
    by_chance = (posterior.stats["mcse_mean"] ** 2).mean("sequence")
    spread = posterior.stats["mean"].var("sequence", ddof=1) - by_chance
    return (spread / scale**2 > ACTIVE).sum("dim")


@seeded(0)
def decompose(model: Model, guide: Guide, posterior: Posterior) -> Decomposition:
    r"""The average KL of N sequences as mutual information and marginal KL (Hoffman & Johnson 2016).

    .. math:: \tfrac1N \sum_i \mathrm{KL}(q(z \mid x_i) \,\|\, p(z)) = I_q(x; z) + \mathrm{KL}(\bar q(z) \,\|\, p(z)),
        \qquad \bar q(z) = \tfrac1N \sum_i q(z \mid x_i)

    The first part is information about which of the N texts it is, at most log N; the second would be 0 for a prior
    equal to the aggregated posterior of these N texts.
    """
    _check_size(posterior, 2, "The decomposition")
    posterior.check_normalised()
    draws = min(MOST_DRAWS, posterior.z.sizes["draw"])
    log_q_SN = posterior.stats.log_q.values[0, :draws]
    log_p_SN = posterior.stats.log_prior.values[0, :draws]
    log_aggregated_SN = np.stack([log_aggregated(model, guide, posterior, draw) for draw in range(draws)])
    parts = (log_q_SN - log_p_SN, log_q_SN - log_aggregated_SN, log_aggregated_SN - log_p_SN)
    documents = posterior.documents
    kl, information, marginal = (clustered_mean(part.mean(0), documents) for part in parts)
    return Decomposition(
        average_kl=kl.value,
        mutual_information=information.value,
        marginal_kl=marginal.value,
        average_kl_stderr=kl.stderr,
        mutual_information_stderr=information.stderr,
        marginal_kl_stderr=marginal.stderr,
        most=math.log(posterior.size),
        saturated=information.value > math.log(posterior.size) - min(math.log(2), math.log(posterior.size) / 2),
    )


@seeded(0)
def log_aggregated(model: Model, guide: Guide, posterior: Posterior, draw: int) -> Float[np.ndarray, " N"]:
    """log (1/N) Σ_j q(z_i | x_j) at one draw z_i of each sequence i, in nats."""
    local, batch = posterior.local(), observed_batch(posterior)
    stored = posterior.group("posterior")
    sites = {
        name: torch.from_numpy(stored[f"{name}_site" if f"{name}_site" in stored else name].values[0, draw])
        for name in prior_sites(model, 1)
    }
    rows = []
    for index in torch.arange(posterior.size).split(ROWS):
        shape = (len(index), batch.size)
        data = {name: x[index][:, None].expand(*shape, *x.shape[1:]) for name, x in sites.items()}
        with no_param_store(), torch.no_grad(), pyro.plate(PARTICLES, len(index), dim=-2):
            trace = poutine.trace(poutine.condition(guide, data=data)).get_trace(batch, local)
        rows.append(sum_log_probs(trace, sites))  # log q(z_i | x_j) of draw i under sequence j
    return (torch.cat(rows).logsumexp(1) - math.log(posterior.size)).numpy()


def observed_batch(posterior: Posterior, start_token: int = 0) -> Batch:
    """The batch of the posterior's sequences."""
    tokens_BT = torch.from_numpy(posterior.group(TEXT)["tokens"].values.astype(np.int64))
    lengths_B = (tokens_BT >= 0).sum(1)
    known = posterior.group("constant_data")
    columns = {name: x.values.tolist() for name, x in known.items() if x.dims == ("sequence",) and name != "document"}
    missing = ("", None)  # and NaN, as which numbers are missing
    labels = [
        {str(name): x for name, column in columns.items() if (x := column[row]) not in missing and x == x}
        for row in range(len(tokens_BT))
    ]
    return with_labels(make_batch(tokens_BT.clamp(min=0), lengths_B, start_token), labels)


class Aggregate(NamedTuple):
    """Two-sample tests of one draw from each sequence's q against as many draws from the prior."""

    c2st: TwoSample
    mmd: Discrepancy


def aggregate(posterior: Posterior, seed: int = 0) -> Aggregate:
    """Compares the aggregated posterior with the prior; if they differ, texts generated from the prior differ too.

    Of each document the first sequence, because the tests are for independent draws and pieces of one document depend
    on each other.
    """
    _, first_N = np.unique(posterior.documents, return_index=True)
    if len(first_N) < FEWEST:
        _check_size(posterior, FEWEST, "The aggregated posterior")
        raise UsageError(
            f"The aggregated posterior needs at least {FEWEST} documents, got {len(first_N)}: infer from more texts."
        )
    q_ND = posterior.draws.values[np.sort(first_N), 0]
    prior = posterior.group("prior")["z"].values[0].reshape(-1, q_ND.shape[1])
    if len(prior) < len(q_ND):
        q_ND = q_ND[np.random.default_rng(seed).permutation(len(q_ND))[: len(prior)]]
    return Aggregate(c2st(q_ND, prior[: len(q_ND)], seed), mmd(q_ND, prior[: len(q_ND)], seed))


def _check_size(posterior: Posterior, least: int, what: str) -> None:
    if posterior.size < least:
        raise UsageError(f"{what} needs at least {least} sequences, got {posterior.size}: infer from more texts.")
