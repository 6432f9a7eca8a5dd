"""q compared with reference chains: mean, scale, correlation and classifier two-sample test.

Shapes: S draws, N coordinates.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from ltm_pyro.analysis.classifiers import c2st
from ltm_pyro.analysis.draws import evenly_spaced
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.errors import UsageError

FEWEST = 25  # draws for the classifier, at least
CONVERGED = 1.05  # largest R-hat of converged chains


def compare(q: Posterior, reference: Posterior) -> xr.Dataset:
    r"""Compares q with Markov chains, for the sequences of the reference.

    Per coordinate: ``mean_error``, (μ_q − μ) / σ, and ``scale_ratio``, σ_q / σ, which is below 1 if q is too narrow.
    Per sequence: ``correlation`` (chains) and ``correlation_q``, the root mean square correlation of two coordinates;
    ``c2st``, the classifier's accuracy, and ``c2st_stderr``; ``r_hat`` (the largest) and ``ess`` (the smallest).
    Correlation and classifier assume independent draws, so the chains are thinned to their effective sample size.
    Raises `UsageError` if the reference has no chains, or sequences that q does not have.
    """
    if "r_hat" not in reference.stats:
        raise UsageError("The reference is not a Markov chain: write one with `ltm posterior --method nuts`.")
    index_of = {row.tobytes(): index for index, row in enumerate(_token_rows(q))}
    try:
        q = q.select([index_of[row.tobytes()] for row in _token_rows(reference)])
    except KeyError:
        raise UsageError("The reference has a sequence that the posterior does not have: use the same input.") from None
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
    rows = [compare_draws(a, b, ess) for a, b, ess in pairs]
    return found.assign({name: ("sequence", [row[name] for row in rows]) for name in rows[0]})


def _token_rows(posterior: Posterior) -> list[np.ndarray]:
    """The tokens of each sequence, without padding."""
    return [row[row >= 0].astype(np.int64) for row in posterior.group("observed_data")["tokens"].values]


def compare_draws(q_SN: Float[np.ndarray, "s N"], chain_SN: Float[np.ndarray, "S N"], ess: float) -> dict[str, Any]:
    """Correlations and classifier accuracy for one sequence; ``ess`` is the chains' effective sample size."""
    chain_SN = thin(chain_SN, max(FEWEST, min(len(q_SN), int(ess))))
    accuracy = c2st(q_SN, chain_SN)
    return {
        "correlation": rms_correlation(chain_SN),
        "correlation_q": rms_correlation(q_SN),
        "c2st": accuracy.mean,
        "c2st_stderr": accuracy.stderr,
    }


def thin(x_SN: Float[np.ndarray, "S N"], count: int) -> Float[np.ndarray, "s N"]:
    """At most ``count`` of the draws, evenly spaced over all of them."""
    return x_SN[evenly_spaced(len(x_SN), count)]


def rms_correlation(x_SN: Float[np.ndarray, "S N"]) -> float:
    """The root mean square correlation of two different coordinates, corrected for the chance correlation of S draws.

    0 if there is only one coordinate.
    """
    corr_NN = np.atleast_2d(np.corrcoef(x_SN.T))
    squares = corr_NN[~np.eye(len(corr_NN), dtype=bool)] ** 2
    if not squares.size:
        return 0.0
    return float(max(squares.mean() - 1 / (len(x_SN) - 1), 0) ** 0.5)


def narrow_rows(found: xr.Dataset, below: float = 0.9) -> list[dict[str, Any]]:
    """The thoughts whose scale ratio (geometric mean over coordinates) is less than ``below``, smallest first."""
    ratio = geometric_mean(found["scale_ratio"], ("dim",)).to_dataframe("ratio").reset_index()
    return ratio[ratio.ratio < below].sort_values("ratio").to_dict("records")


def geometric_mean(x: xr.DataArray, axes: tuple[str, ...]) -> xr.DataArray:
    """The geometric mean over some axes, the right mean for ratios."""
    return x.reduce(lambda values, axis: np.exp(np.log(values).mean(axis)), axes)
