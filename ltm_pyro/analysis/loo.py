"""PSIS-LOO: the predictive density of a token without its own factor, by Pareto-smoothed importance sampling.

To leave a whole text out leaves the prior, and the density is its evidence: `ltm_pyro.analysis.model_comparison`.

Shapes: S draws, N sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from ltm_pyro.analysis.arviz import psis
from ltm_pyro.analysis.posterior import TEXT, Posterior


class Loo(NamedTuple):
    """The expected log predictive density of each token in nats, and its k-hat: (sequence, token)."""

    elpd: xr.DataArray
    pareto_k: xr.DataArray


def loo_by_factor(posterior: Posterior) -> Loo:
    r"""Leaves the factor of one token out of its sequence's likelihood, and predicts the token without it.

    .. math:: \log E_{p_t(z)}[p(x_t \mid x_{<t}, z)], \qquad
        p_t(z) \propto p(z) \prod_{u \ne t} p(x_u \mid x_{<u}, z), \qquad
        w_s \propto \frac{p(x, z_s)}{q(z_s \mid x)\, p(x_t \mid x_{<t}, z_s)}

    The token is still in the contexts of the factors after it, so this is not log p(x_t | all other tokens), which
    would need a fit for every token of the vocabulary; the two agree where tokens are independent given z. The weights
    also correct q (Magnusson et al. 2019, arXiv 1904.10679). Padding is NaN.
    """
    by_token = _rows(posterior.group(TEXT)["log_likelihood"])
    weights = _rows(posterior.log_weights())[:, None]
    there = np.isfinite(by_token).all(-1)
    elpd, k_hat = np.full(there.shape, np.nan), np.full(there.shape, np.nan)
    smooth, k_hat[there] = psis(np.broadcast_to(weights - by_token, by_token.shape)[there])
    elpd[there] = logsumexp(smooth + by_token[there], axis=-1)
    return Loo(*(xr.DataArray(x, dims=("sequence", "token")) for x in (elpd, k_hat)))


def _rows(x: xr.DataArray) -> np.ndarray:
    """As an array with all draws on the last axis."""
    flat = x.stack(sample=("chain", "draw"), create_index=False)
    return flat.transpose(..., "sample").values.astype(float)
