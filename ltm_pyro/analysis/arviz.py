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
    groups = {name: node.to_dataset() for name, node in tree.children.items() if name != "local"}
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
    """Pareto-smoothed, normalised log-weights of S draws along the last axis, and k-hat (arXiv 1507.02646)."""
    if not SPLIT:
        weights, k_hat = arviz.psislw(log_ratios_nS, reff=1.0)
        return np.asarray(weights), np.asarray(k_hat)
    from arviz_stats.base import array_stats

    return array_stats.psislw(log_ratios_nS, r_eff=1.0, axis=-1)
