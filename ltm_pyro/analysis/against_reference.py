"""q compared with reference chains: mean, scale, correlation and classifier two-sample test.

Shapes: S draws, N coordinates.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.special import fdtri, stdtr

from ltm_pyro.analysis.arviz import ess
from ltm_pyro.analysis.classifiers import c2st
from ltm_pyro.analysis.draws import evenly_spaced
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.errors import UsageError

FEWEST = 25  # draws for the classifier, at least
CONVERGED = 1.01  # largest R-hat of converged long chains (Vehtari et al. 2021, arXiv 1903.08008)
EFFECTIVE = 400  # draws that R-hat and ess need to be believed (the same source)
SHIFTED, NARROW, WIDE = 0.2, 0.9, 1 / 0.9  # of the mean in sd, and of the scale: smaller differences do not matter


def largest_r_hat(chains: Posterior) -> float:
    r"""What R-hat of converged chains does not exceed in any coordinate, but for one of twenty such files; from 1.01.

    Of m half chains of n independent draws B / W is F-distributed, and R-hat² = 1 − 1/n + (B / W) / n. There are two
    for each coordinate, of ranks and of folded ranks (Bonferroni).
    """
    sizes = chains.z.sizes
    halves, draws = 2 * sizes["chain"], max(sizes["draw"] // 2, 2)
    numbers = 2 * int(np.prod([sizes[axis] for axis in ("sequence", *THOUGHTS)]))
    quantile = fdtri(halves - 1, halves * (draws - 1), 1 - 0.05 / numbers)
    return max(CONVERGED, float(np.sqrt(1 - 1 / draws + quantile / draws)))


def compare(q: Posterior, reference: Posterior) -> xr.Dataset:
    r"""Compares q with Markov chains, for the sequences of the reference.

    Per coordinate: ``mean_error``, (μ_q − μ) / σ, and ``scale_ratio``, σ_q / σ, which is below 1 if q is too narrow and
    above 1 if it is too wide; ``mean_p`` and ``scale_p``, two-sided p-values of no difference, from the effective
    sample sizes of the chains' mean and standard deviation. Per sequence: ``correlation`` (chains) and
    ``correlation_q``, the root mean square correlation of two coordinates; ``c2st``, the classifier's accuracy,
    ``c2st_stderr`` and ``c2st_p``; ``r_hat`` (the largest), ``ess`` and ``ess_tail`` (the smallest). Correlation and
    classifier assume independent draws, so the chains are thinned to their effective sample size. Raises `UsageError`
    if the reference has no chains, or sequences that q does not have.
    """
    if "r_hat" not in reference.stats:
        raise UsageError("The reference is not a Markov chain: write one with `ltm posterior --method nuts`.")
    index_of = {row.tobytes(): index for index, row in enumerate(q.rows)}
    try:
        q = q.select([index_of[row.tobytes()] for row in reference.rows])
    except KeyError:
        raise UsageError("The reference has a sequence that the posterior does not have: use the same input.") from None
    axes = ("sequence", *THOUGHTS)
    z, stats = reference.z.transpose(*SAMPLES, *axes), reference.stats
    mean, sd = z.mean(SAMPLES).values, z.std(SAMPLES).values
    if stuck := int((sd == 0).reshape(len(sd), -1).any(1).sum()):
        raise UsageError(
            f"In the chains of {stuck} sequences a coordinate never moves: they say nothing about q, run them longer."
        )
    of_q = {name: q.stats[name].transpose(*axes).values for name in ("mean", "sd", "mcse_mean")}
    mean_error, ratio = (of_q["mean"] - mean) / sd, of_q["sd"] / sd
    bulk, for_sd = stats.ess.transpose(*axes).values, ess(z.values, "sd")
    kurtosis = np.maximum((((z.values - mean) / sd) ** 4).mean((0, 1)), 3)  # 3 is the normal's
    exact = (of_q["mcse_mean"] == 0).all()  # q's moments are known, not estimated from its draws
    own = 0 if exact else 1 / (2 * q.z.sizes["draw"])
    z_mean = mean_error / np.sqrt(1 / bulk + (of_q["mcse_mean"] / sd) ** 2)
    with np.errstate(divide="ignore"):  # a point has no scale
        z_scale = np.log(ratio) / np.sqrt((kurtosis - 1) / (4 * for_sd) + own)
    found = xr.Dataset(
        {
            "mean_error": (axes, mean_error),
            "mean_p": (axes, 2 * stdtr(bulk, -np.abs(z_mean))),
            "scale_ratio": (axes, ratio),
            "scale_p": (axes, 2 * stdtr(for_sd, -np.abs(z_scale))),
            "r_hat": ("sequence", stats.r_hat.max(THOUGHTS).values),
            "ess": ("sequence", stats.ess.min(THOUGHTS).values),
            "ess_tail": ("sequence", (stats.ess_tail if "ess_tail" in stats else stats.ess).min(THOUGHTS).values),
        },
        {name: reference.z.coords[name] for name in ("layer", "thought") if name in reference.z.coords},
    )
    pairs = zip(q.draws.values, reference.draws.values, found["ess"].values, strict=True)
    rows = [compare_draws(a, b, ess) for a, b, ess in pairs]
    return found.assign({name: ("sequence", [row[name] for row in rows]) for name in rows[0]})


def differences(found: xr.Dataset, size: float) -> dict[str, int]:
    """How many coordinates of q are shifted, narrow or wide, and from how many sequences' chains q can be told apart.

    Each is a difference that matters, and one that the chains' own errors do not explain: ``size`` is the probability
    that an exact q has any of them (Bonferroni over the three kinds of tests and over coordinates and sequences).
    """
    level, coordinates = size / 3, found["mean_p"].size
    off = ~(found["mean_p"] >= level / coordinates)  # so that NaN is a difference
    scaled = ~(found["scale_p"] >= level / coordinates)
    return {
        "shifted": int((off & ~(abs(found["mean_error"]) <= SHIFTED)).sum()),
        "narrow": int((scaled & (found["scale_ratio"] < NARROW)).sum()),
        "wide": int((scaled & (found["scale_ratio"] > WIDE)).sum()),
        "told apart": int((~(found["c2st_p"] >= level / found.sizes["sequence"])).sum()),
    }


def compare_draws(q_SN: Float[np.ndarray, "s N"], chain_SN: Float[np.ndarray, "S N"], ess: float) -> dict[str, Any]:
    """Correlations and classifier accuracy for one sequence; ``ess`` is the chains' effective sample size."""
    chain_SN = thin(chain_SN, max(FEWEST, min(len(q_SN), int(ess))))
    found = c2st(q_SN, chain_SN)
    return {
        "correlation": rms_correlation(chain_SN),
        "correlation_q": rms_correlation(q_SN),
        "c2st": found.mean,
        "c2st_stderr": found.stderr,
        "c2st_p": found.p_value,
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


def geometric_mean(x: xr.DataArray, axes: tuple[str, ...]) -> xr.DataArray:
    """The geometric mean over some axes, the right mean for ratios."""
    return x.reduce(lambda values, axis: np.exp(np.log(values).mean(axis)), axes)
