"""PSIS-LOO: leave-one-out predictive densities by Pareto-smoothed importance sampling, by factor and by sequence.

Shapes: S draws, N sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from ltm_pyro.analysis.arviz import psis
from ltm_pyro.analysis.posterior import Posterior


class Loo(NamedTuple):
    """The expected log predictive density of each unit in nats, its k-hat, and a description of the unit."""

    elpd: xr.DataArray
    pareto_k: xr.DataArray
    unit: str


def loo_by_factor(posterior: Posterior) -> Loo:
    r"""Leaves the factor of one token out of its sequence's likelihood, and predicts the token without it.

    .. math:: \log E_{p_t(z)}[p(x_t \mid x_{<t}, z)], \qquad
        p_t(z) \propto p(z) \prod_{u \ne t} p(x_u \mid x_{<u}, z), \qquad
        w_s \propto \frac{p(x, z_s)}{q(z_s \mid x)\, p(x_t \mid x_{<t}, z_s)}

    The token is still in the contexts of the factors after it, so this is not log p(x_t | all other tokens), which
    would need a fit for every token of the vocabulary; the two agree where tokens are independent given z. The weights
    also correct q (Magnusson et al. 2019, arXiv 1904.10679). Padding is NaN.
    """
    by_token = _rows(posterior.group("log_likelihood")["by_token"])
    weights = _rows(posterior.log_weights())[:, None]
    return _loo(weights - by_token, by_token, ("sequence", "token"), "a token's factor p(x_t | x_<t, z)")


def loo_by_sequence(posterior: Posterior) -> Loo:
    r"""Leaves one sequence out.

    No other sequence informs its thoughts, so without it their distribution is the prior. The predictive density is
    then the sequence's evidence, estimated by the importance-weighted bound with Pareto-smoothed weights.

    .. math:: \log E_{p(z)}[p(x \mid z)] \approx \log \tfrac1S \textstyle\sum_s \tilde w_s, \qquad
        w_s = p(x, z_s) / q(z_s \mid x)
    """
    posterior.check_normalised()
    raw = _rows(posterior.log_weights())
    smooth, k_hat = psis(raw)
    lowest = raw.argmin(-1)[:, None]  # not in the tail, so not smoothed: the difference there is the log normaliser
    total = np.take_along_axis(raw - smooth, lowest, -1)[:, 0]
    elpd = total - np.log(raw.shape[-1])
    return Loo(xr.DataArray(elpd, dims="sequence"), xr.DataArray(k_hat, dims="sequence"), "a sequence")


def _rows(x: xr.DataArray) -> np.ndarray:
    """As an array with all draws on the last axis."""
    flat = x.stack(sample=("chain", "draw"), create_index=False)
    return flat.transpose(..., "sample").values.astype(float)


def _loo(ratios: np.ndarray, nats: np.ndarray, dims: tuple[str, ...], unit: str) -> Loo:
    there = np.isfinite(nats).all(-1)
    elpd, k_hat = np.full(there.shape, np.nan), np.full(there.shape, np.nan)
    weights, k_hat[there] = psis(np.broadcast_to(ratios, nats.shape)[there])
    elpd[there] = logsumexp(weights + nats[there], axis=-1)
    return Loo(xr.DataArray(elpd, dims=dims), xr.DataArray(k_hat, dims=dims), unit)
