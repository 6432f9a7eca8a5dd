"""Posterior predictive checks: are texts generated from q's draws like the texts that q was fitted to?

Shapes: N sequences, T tokens, R replicas.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.statistics import clustered_mean

Row = Any  # the tokens of one text, without padding


def _repeated_pairs(row: Row) -> float:
    pairs = [*zip(row[:-1].tolist(), row[1:].tolist(), strict=True)]
    return 1 - len({*pairs}) / len(pairs) if pairs else 0.0


STATISTICS: dict[str, Callable[[Row], float]] = {
    "tokens": len,
    "different tokens (share)": lambda row: len(np.unique(row)) / max(len(row), 1),
    "repeated pairs (share)": _repeated_pairs,
    "most frequent token (share)": lambda row: np.unique(row, return_counts=True)[1].max(initial=0) / max(len(row), 1),
}


def check(posterior: Posterior, statistics: dict[str, Callable[[Row], float]] | None = None) -> xr.Dataset:
    r"""Compares statistics of the texts with those of their replicas, text by text.

    .. math:: \bar d = \tfrac1N \sum_i \big[ T(x_i) - \tfrac1R \sum_r T(x_{ir}) \big]

    ``observed`` and ``replicated`` (by replica) are averages over sequences, ``difference`` is their difference with
    ``stderr`` over documents, and ``p_value`` that of "no difference". A replica is generated from a draw of q, which
    was fitted to the text: if model and q are right, text and replica can be exchanged, so that differences scatter
    about 0. The p-value has the size it says, other than the share of larger replicas (a posterior predictive p-value),
    which is drawn towards 0.5 because q has seen the text (Gelman, Meng & Stern 1996; Bayarri & Berger 2000).
    """
    if "posterior_predictive" not in posterior.tree:
        raise UsageError("This posterior has no replicas: make some with `ltm posterior --replicas 2`.")
    statistics = statistics or STATISTICS
    own = posterior.group("observed_data")["tokens"].values
    replicas = posterior.group("posterior_predictive")["tokens"].values[0]
    found = np.array([[function(row[row >= 0]) for row in own] for function in statistics.values()], float)
    other = np.array([[[f(row[row >= 0]) for row in rows] for rows in replicas] for f in statistics.values()], float)
    apart = found - other.mean(1)
    apart[np.isclose(found, other.mean(1), rtol=1e-12, atol=0)] = 0  # the mean of equal shares is rounded
    difference = clustered_mean(apart.T, np.array(posterior.labels["document"]))
    return xr.Dataset(
        {
            "observed": ("statistic", found.mean(1)),
            "replicated": (("statistic", "replica"), other.mean(2)),
            "difference": ("statistic", difference.value),
            "stderr": ("statistic", difference.stderr),
            "p_value": ("statistic", difference.p_value),
        },
        {"statistic": list(statistics)},
    )
