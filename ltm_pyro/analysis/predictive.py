"""Posterior predictive checks: do texts written from q's draws look like the texts q was fitted to?

Shapes: N sequences, T tokens, R replicas.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError

Row = Any  # the tokens of one text, padding left out


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
    """Each statistic of the texts and of their replicas, averaged over sequences, and the share of larger replicas.

    ``observed`` and ``replicated`` (by replica) are averages; ``p_value`` is the share of pairs (sequence, replica)
    whose replica has the larger value, ties by half: near 0 or 1 where the model's texts differ from the data's
    (Gelman, Meng & Stern 1996). Replicas are written from draws of q, which has seen the text.
    """
    if "posterior_predictive" not in posterior.tree:
        raise UsageError("There are no replicas: write some with `ltm posterior --replicas 2`.")
    statistics = statistics or STATISTICS
    own = posterior.group("observed_data")["tokens"].values
    replicas = posterior.group("posterior_predictive")["tokens"].values[0]
    found = np.array([[function(row[row >= 0]) for row in own] for function in statistics.values()])
    other = np.array([[[f(row[row >= 0]) for row in rows] for rows in replicas] for f in statistics.values()])
    larger = (other > found[:, None]) + 0.5 * (other == found[:, None])
    return xr.Dataset(
        {
            "observed": ("statistic", found.mean(1)),
            "replicated": (("statistic", "replica"), other.mean(2)),
            "p_value": ("statistic", larger.mean((1, 2))),
        },
        {"statistic": list(statistics)},
    )
