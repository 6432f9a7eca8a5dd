"""The ELBO over the fast steps of every text, and whose was still climbing at the end.

Shapes: N fast steps, B sequences.
"""

import numpy as np
import xarray as xr
from scipy.stats import t as student

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError

FEWEST = 8  # fast steps: two quarters with an error
LEVEL = 0.05  # of one false alarm among all sequences
WORTH = 0.1  # nats per sequence: a smaller gain does not matter


def climbing(posterior: Posterior) -> xr.Dataset:
    r"""What the last quarter of the fast steps gained over the quarter before it, of every sequence.

    .. math:: g = \overline{\mathrm{ELBO}}_{\text{last quarter}} - \overline{\mathrm{ELBO}}_{\text{quarter before}}

    ``gain`` in nats with ``stderr`` from the scatter inside the quarters, since each step's ELBO is that of a fresh
    draw; ``is_climbing`` where it is above 0.1 nats and what noise would give to one of all B sequences in twenty such
    files (Welch's t, Bonferroni): more steps would find a better q.
    """
    stats = posterior.stats
    if "elbo_by_step" not in stats or stats.sizes["step"] < FEWEST:
        raise UsageError(f"The ELBO over fast steps needs at least {FEWEST} of them: give more --fast-steps.")
    elbo_NB = stats["elbo_by_step"].transpose("step", "sequence").values.astype(float)
    quarter = len(elbo_NB) // 4
    before, last = elbo_NB[-2 * quarter : -quarter], elbo_NB[-quarter:]
    gain_B = last.mean(0) - before.mean(0)
    of_last, of_before = last.var(0, ddof=1), before.var(0, ddof=1)
    stderr_B = ((of_last + of_before) / quarter) ** 0.5
    freedom_B = (quarter - 1) * (of_last + of_before) ** 2 / np.maximum(of_last**2 + of_before**2, 1e-300)
    limit_B = student.isf(LEVEL / len(gain_B), np.maximum(freedom_B, 1.0))
    is_climbing_B = (gain_B > WORTH) & (gain_B > limit_B * stderr_B)
    data = {"gain": gain_B, "stderr": stderr_B, "is_climbing": is_climbing_B}
    return xr.Dataset({name: ("sequence", x) for name, x in data.items()})
