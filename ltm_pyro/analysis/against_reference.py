"""q beside a reference posterior: centre, scale, correlation, and whether a classifier can tell them apart.

Shapes: S draws, N coordinates.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from ltm_pyro.analysis.classifiers import c2st
from ltm_pyro.analysis.draws import evenly
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.errors import UsageError

FEWEST = 25  # draws that a classifier is trained on
CONVERGED = 1.05  # R-hat up to which chains count as one


def compare(q: Posterior, reference: Posterior) -> xr.Dataset:
    r"""What q says beside what the chains say, for the reference's sequences.

    By coordinate: ``mean_error``, (μ_q − μ) / σ, and ``scale_ratio``, σ_q / σ, below 1 where q is too narrow. By
    sequence: ``correlation`` and ``correlation_q``, the root mean square correlation of two coordinates; ``c2st`` with
    ``c2st_stderr``; ``r_hat`` (the largest) and ``ess`` (the smallest). Correlation and classifier take draws for
    independent, so they see as many of the reference's as the smallest effective sample size, spread over all chains.
    """
    q = _matched(q, reference)
    axes = ("sequence", *THOUGHTS)
    mean, sd = (x.transpose(*axes).values for x in (reference.z.mean(SAMPLES), reference.z.std(SAMPLES)))
    found = xr.Dataset(
        {
            "mean_error": (axes, (q.stats["mean"].transpose(*axes).values - mean) / sd),
            "scale_ratio": (axes, q.stats["sd"].transpose(*axes).values / sd),
            "r_hat": ("sequence", reference.stats.r_hat.max(THOUGHTS).values),
            "ess": ("sequence", reference.stats.ess.min(THOUGHTS).values),
        }
    )
    pairs = zip(q.draws.values, reference.draws.values, found["ess"].values, strict=True)
    rows = [_pair(a, b, ess) for a, b, ess in pairs]
    return found.assign({name: ("sequence", [row[name] for row in rows]) for name in rows[0]})


def _matched(q: Posterior, reference: Posterior) -> Posterior:
    """q's sequences in the reference's order."""
    if "r_hat" not in reference.stats:
        raise UsageError("The reference is no Markov chain: write one with `ltm posterior --method nuts`.")
    tokens = {row.tobytes(): index for index, row in enumerate(_trimmed(q))}
    try:
        return q.select([tokens[row.tobytes()] for row in _trimmed(reference)])
    except KeyError:
        raise UsageError("The reference has a sequence that the posterior does not have: use the same input.") from None


def _trimmed(posterior: Posterior) -> list[np.ndarray]:
    return [row[row >= 0].astype(np.int64) for row in posterior.group("observed_data")["tokens"].values]


def _pair(a_SN: Float[np.ndarray, "s N"], b_SN: Float[np.ndarray, "S N"], ess: float) -> dict[str, Any]:
    seen_SN = spread(b_SN, max(FEWEST, min(len(a_SN), int(ess))))
    accuracy = c2st(a_SN, seen_SN)
    return {
        "correlation": correlation(seen_SN),
        "correlation_q": correlation(a_SN),
        "c2st": accuracy.mean,
        "c2st_stderr": accuracy.stderr,
    }


def spread(x_SN: Float[np.ndarray, "S N"], count: int) -> Float[np.ndarray, "s N"]:
    """At most so many of the draws, evenly spread over all of them."""
    return x_SN[evenly(len(x_SN), count)]


def correlation(x_SN: Float[np.ndarray, "S N"]) -> float:
    """The root mean square correlation of two different coordinates, less what S draws show of it by chance.

    0 where there is one coordinate.
    """
    corr_NN = np.atleast_2d(np.corrcoef(x_SN.T))
    squares = corr_NN[~np.eye(len(corr_NN), dtype=bool)] ** 2
    if not squares.size:
        return 0.0
    return float(max(squares.mean() - 1 / (len(x_SN) - 1), 0) ** 0.5)


def narrow_rows(found: xr.Dataset, below: float = 0.9) -> list[dict[str, Any]]:
    """The thoughts for which q is too narrow, narrowest first: the geometric mean of their scale ratios."""
    ratio = geometric_mean(found["scale_ratio"], ("dim",)).to_dataframe("ratio").reset_index()
    return ratio[ratio.ratio < below].sort_values("ratio").to_dict("records")


def geometric_mean(x: xr.DataArray, axes: tuple[str, ...]) -> xr.DataArray:
    """exp of the average log over some axes: the mean of ratios."""
    return x.reduce(lambda values, axis: np.exp(np.log(values).mean(axis)), axes)
