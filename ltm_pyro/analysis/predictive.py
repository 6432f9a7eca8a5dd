"""Posterior predictive checks: are texts generated from q's draws like the texts that q was fitted to?

Shapes: N sequences, T tokens, R replicas.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from inspect import isfunction
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.errors import UsageError
from ltm_pyro.training.plugins import import_file, locate
from ltm_pyro.utils.statistics import clustered_mean

Row = Any  # the tokens of one text, without padding


def _repeated_pairs(row: Row) -> float:
    pairs = [*zip(row[:-1].tolist(), row[1:].tolist(), strict=True)]
    return 1 - len({*pairs}) / len(pairs) if pairs else 0.0


STATISTICS: dict[str, Callable[[Row], float]] = {
    "tokens": len,
    "different_tokens": lambda row: len(np.unique(row)) / max(len(row), 1),  # their share, as of the next two
    "repeated_pairs": _repeated_pairs,
    "most_frequent_token": lambda row: np.unique(row, return_counts=True)[1].max(initial=0) / max(len(row), 1),
}


def statistics_of(tokens: xr.DataArray, statistics: Mapping[str, Callable[[Row], float]] | None = None) -> xr.Dataset:
    """Statistics of every row of tokens, the last axis; what is below 0 is padding and left out."""
    rows, axes = tokens.values.reshape(-1, tokens.shape[-1]), tokens.dims[:-1]
    found = {
        name: np.array([function(row[row >= 0]) for row in rows], float).reshape(tokens.shape[:-1])
        for name, function in (statistics or STATISTICS).items()
    }
    return xr.Dataset({name: (axes, x) for name, x in found.items()})


def check(
    posterior: Posterior,
    statistics: Mapping[str, Callable[[Row], float]] | None = None,
    of_text: Mapping[str, Callable[[str], float]] = {},
) -> xr.Dataset:
    r"""Compares statistics of the texts with those of their replicas, text by text.

    .. math:: \bar d = \tfrac1N \sum_i \big[ T(x_i) - \tfrac1R \sum_r T(x_{ir}) \big]

    ``observed`` and ``replicated`` (by replica) are averages over sequences, ``difference`` is their difference with
    ``stderr`` over documents, and ``p_value`` that of "no difference". A replica is generated from a draw of q, which
    was fitted to the text: if model and q are right, text and replica can be exchanged, so that differences scatter
    about 0. The p-value has the size it says, other than the share of larger replicas (a posterior predictive p-value),
    which is drawn towards 0.5 because q has seen the text (Gelman, Meng & Stern 1996; Bayarri & Berger 2000).

    Args:
        statistics: of the tokens of a text; by default `STATISTICS`.
        of_text: statistics of the text itself, besides them.
    """
    texts = posterior.group(TEXT)
    if "replica_tokens" not in texts:
        raise UsageError("This posterior has no replicas: make some with `ltm posterior --replicas 2`.")
    own, theirs = (statistics_of(texts[name], statistics) for name in ("tokens", "replica_tokens"))
    for name, function in of_text.items():
        if name in own:
            raise UsageError(f"A statistic of your own is called {name}, as one of ours is: give it another name.")
        for found, kind in ((own, "text"), (theirs, "replica_text")):
            if kind not in texts:
                raise UsageError("This posterior has no texts of its replicas: make it again with `ltm posterior`.")
            values = [_number(name, function, str(text)) for text in texts[kind].values.ravel()]
            found[name] = (texts[kind].dims, np.reshape(values, texts[kind].shape))
    names, observed, other = list(own), own.to_array().values, theirs.to_array().values
    apart = observed - other.mean(1)
    apart[np.isclose(observed, other.mean(1), rtol=1e-12, atol=0)] = 0  # the mean of equal shares is rounded
    difference = clustered_mean(apart.T, posterior.documents)
    return xr.Dataset(
        {
            "observed": ("statistic", observed.mean(1)),
            "replicated": (("statistic", "replica"), other.mean(2)),
            "difference": ("statistic", difference.value),
            "stderr": ("statistic", difference.stderr),
            "p_value": ("statistic", difference.p_value),
        },
        {"statistic": names},
    )


def load_statistics(path: Path, trust: bool) -> dict[str, Callable[[str], float]]:
    """The functions that a Python file of the user's defines: each takes a text and returns a number.

    The file is imported and executed, which needs ``trust``. Names that begin with ``_`` are left out.
    """
    if not trust:
        raise UsageError(f"{path} is code, which is only executed if you say so: read it, and add --trust.")
    file = locate(path)
    print(f"Executing {file}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}", file=sys.stderr)
    module = sys.modules[import_file(file)]
    own = {name: x for name, x in vars(module).items() if isfunction(x) and x.__module__ == module.__name__}
    found: dict[str, Callable[[str], float]] = {name: x for name, x in own.items() if not name.startswith("_")}
    if not found:
        raise UsageError(f"{path} defines no function: define one that takes a text and returns a number.")
    return found


def _number(name: str, function: Callable[[str], float], text: str) -> float:
    try:
        return float(function(text))
    except Exception as error:  # of the user's own code
        raise UsageError(f"The statistic {name} fails for a text: {type(error).__name__}: {error}; mend it.") from None
