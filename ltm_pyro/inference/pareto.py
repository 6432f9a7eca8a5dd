"""Pareto k-hat, a diagnostic of q: the tail of each sequence's importance weights.

Shapes: S posterior samples, B sequences.
"""

import torch
from jaxtyping import Float
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from ltm_pyro.errors import UsageError

TRUSTED = 0.7  # k-hat above it: importance sampling from q is unreliable (Vehtari et al. 2024, arXiv 1507.02646)


def pareto_k(log_weights_SB: Float[Tensor, "S B"]) -> Float[Tensor, " B"]:
    r"""k-hat: the shape of a generalised Pareto distribution fitted to each sequence's largest importance weights.

    Below 0.5 q is good; above `TRUSTED` q misses a part of the posterior's mass (Yao et al. 2018, arXiv 1802.02538).
    The tail is the largest min(S / 5, 3 √S) of the S weights. k-hat is −∞ if these differ by less than a thousandth of
    the largest weight, as when q is exact up to rounding, and +∞ if nearly all of them are 0 beside the largest.
    """
    samples = len(log_weights_SB)
    tail = int(min(0.2 * samples, 3 * samples**0.5))
    if tail < 5:
        raise UsageError(f"Pareto k-hat needs at least 25 samples, got {samples}: draw more.")
    double_SB = log_weights_SB.double().cpu()  # the tail of a bad q underflows in float32; the fits run one by one
    sorted_SB = (double_SB - double_SB.max(0).values).sort(0).values.exp()
    excess_tB = sorted_SB[-tail:] - sorted_SB[-tail - 1]
    return torch.stack([_pareto_shape(excess_t) for excess_t in excess_tB.unbind(1)]).to(log_weights_SB.device)


def _pareto_shape(excess_t: Tensor) -> Tensor:
    if not excess_t.isfinite().all():
        return excess_t.new_tensor(torch.nan)
    if excess_t[-1] < 1e-3:
        return excess_t.new_tensor(-torch.inf)
    if excess_t[int(len(excess_t) / 4 - 0.5)] <= 0:  # Pyro divides by this quartile
        return excess_t.new_tensor(torch.inf)
    return torch.as_tensor(fit_generalized_pareto(excess_t)[0], dtype=excess_t.dtype)
