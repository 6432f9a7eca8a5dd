"""Posterior predictive checks: are texts generated from q's draws like the texts that q was fitted to?

Shapes: N sequences, T tokens, R replicas.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError

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
    """Compares statistics of the texts with those of their replicas (Gelman, Meng & Stern 1996).

    ``observed`` and ``replicated`` (by replica) are averages over sequences; ``p_value`` is the share of pairs
    (sequence, replica) whose replica has the larger value, ties counted half: near 0 or 1 if the model's texts differ
    from the data. Replicas are generated from draws of q, which was fitted to the same text.
    """
    if "posterior_predictive" not in posterior.tree:
        raise UsageError("This posterior has no replicas: make some with `ltm posterior --replicas 2`.")
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
