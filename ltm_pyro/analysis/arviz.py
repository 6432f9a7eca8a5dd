"""ArviZ before 1.0 (`arviz.InferenceData`) and from 1.0 on (`xarray.DataTree`).

Shapes: C chains, S draws, n any further axes.
"""

import warnings
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import xarray as xr

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # 0.23 warns of 1.0 at every import
    import arviz

SPLIT = int(version("arviz").split(".")[0]) >= 1  # one package before 1.0, three packages from 1.0 on


def inference_data(tree: xr.DataTree) -> Any:
    """The tree in the form that the installed ArviZ accepts."""
    if SPLIT:
        return tree
    groups = {name: node.to_dataset() for name, node in tree.children.items() if node.data_vars}
    sequences = groups["observed_data"].sizes["sequence"]
    if "prior" in groups:  # which is the same for all sequences, but plots compare variables of one shape
        z = groups["prior"]["z"].expand_dims(sequence=sequences, axis=2)
        groups["prior"] = z.assign_coords(sequence=groups["observed_data"]["sequence"]).to_dataset()
    return arviz.InferenceData(attrs=dict(tree.attrs), warn_on_custom_groups=False, **groups)


def rhat(x_CSn: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of every coordinate (Vehtari et al. 2021, arXiv 1903.08008).

    It is infinite where no chain has moved.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return arviz.rhat(_named(x_CSn))["x"].values


def ess(x_CSn: np.ndarray, method: Literal["bulk", "tail", "sd"] = "bulk") -> np.ndarray:
    """Effective sample size of every coordinate, in the bulk, in the tails or for its scale (Vehtari et al. 2021)."""
    return arviz.ess(_named(x_CSn), method=method)["x"].values


def _named(x_CSn: np.ndarray) -> xr.Dataset:
    rest = [f"axis_{index}" for index in range(x_CSn.ndim - 2)]
    return xr.Dataset({"x": (("chain", "draw", *rest), x_CSn)})


def psis(log_ratios_nS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed, normalised log-weights of S draws along the last axis, and k-hat (arXiv 1507.02646).

    k-hat is −∞ where the weights are equal but for rounding, as those of an exact q are.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if SPLIT:
            from arviz_stats.base import array_stats

            weights, k_hat = array_stats.psislw(log_ratios_nS, r_eff=1.0, axis=-1)
        else:
            weights, k_hat = arviz.psislw(log_ratios_nS, reff=1.0)
    equal = np.ptp(log_ratios_nS, -1) < 1e-3
    weights, k_hat = np.array(weights), np.array(k_hat)
    weights[equal], k_hat[equal] = -np.log(log_ratios_nS.shape[-1]), -np.inf
    return weights, k_hat


def elpd_data(elpd_N: xr.DataArray, pareto_k_N: xr.DataArray, samples: int, good_k: float) -> Any:
    """Expected log predictive densities of N independent units, in the class that `arviz.compare` accepts."""
    count, total, none = elpd_N.size, float(elpd_N.sum()), float("nan")  # no effective number of parameters
    se, is_doubtful = float(elpd_N.std(ddof=0) * count**0.5), bool((~(pareto_k_N <= good_k)).any())
    if SPLIT:
        of_loo: Any = getattr(arviz, "ELPDDataLOO")  # noqa: B009 - of version 1
        return of_loo(
            elpd=total,
            se=se,
            p=none,
            n_samples=samples,
            n_data_points=count,
            scale="log",
            warning=is_doubtful,
            good_k=good_k,
            elpd_i=elpd_N,
            pareto_k=pareto_k_N,
        )
    from arviz.stats.stats_utils import ELPDData

    values = [total, se, none, samples, count, is_doubtful, elpd_N, "log", pareto_k_N, good_k]
    names = ["elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "scale", "pareto_k", "good_k"]
    return ELPDData(data=values, index=names)
