"""Power laws through a few points, with intervals that say how little a few points know."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, linregress


class PowerLaw(NamedTuple):
    """y = scale · x^−exponent, with a 90 % bootstrap interval of the exponent."""

    scale: float
    exponent: float
    low: float
    high: float

    def at(self, x: np.ndarray) -> np.ndarray:
        """The fitted curve."""
        return self.scale * x**-self.exponent

    def __str__(self) -> str:
        return f"{self.scale:.3g} · C^-{self.exponent:.4f} (90 % interval {self.low:.4f} to {self.high:.4f})"


def power_law(x: Sequence[float], y: Sequence[float], draws: int = 2000) -> PowerLaw:
    """Least squares in logarithms, no constant term; the residuals are resampled for the interval.

    A loss with an irreducible part bends away from any power law, so an exponent holds for the range that it was
    fitted on. Needs three points.
    """
    log_x, log_y = np.log(x), np.log(y)
    line = linregress(log_x, log_y)
    fitted = line.intercept + line.slope * log_x
    residuals = (log_y - fitted) * np.sqrt(len(log_x) / (len(log_x) - 2))  # two degrees of freedom are spent

    def exponent(resampled: np.ndarray) -> float:
        return float(-linregress(log_x, fitted + resampled).slope)

    interval = bootstrap(
        (residuals,),
        exponent,
        vectorized=False,
        n_resamples=draws,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return PowerLaw(float(np.exp(line.intercept)), float(-line.slope), float(interval.low), float(interval.high))
