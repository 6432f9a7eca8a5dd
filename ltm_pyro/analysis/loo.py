"""Leave one out, by Pareto-smoothed importance sampling: a token of a sequence, or a sequence with its own thoughts.

Shapes: S draws, N sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from ltm_pyro.analysis.arviz import psis
from ltm_pyro.analysis.posterior import Posterior


class Loo(NamedTuple):
    """Each unit's expected log predictive density in nats, its k-hat, and which unit is left out."""

    elpd: xr.DataArray
    pareto_k: xr.DataArray
    unit: str


def loo_by_token(posterior: Posterior) -> Loo:
    r"""Leaves one token out of its own sequence; the sequence's other tokens, the later ones too, stay.

    .. math:: \log E_{p(z \mid x_{-t})}[p(x_t \mid x_{<t}, z)], \qquad
        w_s \propto \frac{p(x, z_s)}{q(z_s \mid x)\, p(x_t \mid x_{<t}, z_s)}

    The weights also correct q (Magnusson et al. 2019, arXiv 1904.10679). Padding is nan.
    """
    by_token = _rows(posterior.group("log_likelihood")["by_token"])
    weights = _rows(posterior.log_weights())[:, None]
    return _loo(weights - by_token, by_token, ("sequence", "token"), "a token, given all others of its sequence")


def loo_by_sequence(posterior: Posterior) -> Loo:
    r"""Leaves one sequence out.

    Its thoughts are its own, so without it they are the prior's, and what is left is the sequence's evidence under the
    model's fixed parameters: the importance-weighted bound with its largest weights smoothed.

    .. math:: \log E_{p(z)}[p(x \mid z)] \approx \log \tfrac1S \textstyle\sum_s \tilde w_s, \qquad
        w_s = p(x, z_s) / q(z_s \mid x)
    """
    posterior.check_normalised()
    raw = _rows(posterior.log_weights())
    smooth, k_hat = psis(raw)
    lowest = raw.argmin(-1)[:, None]  # not in the tail, so left as it is: there the normaliser shows
    total = np.take_along_axis(raw - smooth, lowest, -1)[:, 0]
    elpd = total - np.log(raw.shape[-1])
    return Loo(xr.DataArray(elpd, dims="sequence"), xr.DataArray(k_hat, dims="sequence"), "a sequence")


def _rows(x: xr.DataArray) -> np.ndarray:
    """Draws last."""
    flat = x.stack(sample=("chain", "draw"), create_index=False)
    return flat.transpose(..., "sample").values.astype(float)


def _loo(ratios: np.ndarray, nats: np.ndarray, dims: tuple[str, ...], unit: str) -> Loo:
    there = np.isfinite(nats).all(-1)
    elpd, k_hat = np.full(there.shape, np.nan), np.full(there.shape, np.nan)
    weights, k_hat[there] = psis(np.broadcast_to(ratios, nats.shape)[there])
    elpd[there] = logsumexp(weights + nats[there], axis=-1)
    return Loo(xr.DataArray(elpd, dims=dims), xr.DataArray(k_hat, dims=dims), unit)
