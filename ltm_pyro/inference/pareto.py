"""Can q be trusted? The tail of the importance weights, sequence by sequence.

Shapes: S posterior samples, B sequences.
"""

import torch
from jaxtyping import Float
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from ltm_pyro.errors import UsageError

TRUSTED = 0.7  # above it importance sampling from q is unreliable (Vehtari et al. 2024, arXiv 1507.02646)


def pareto_k(log_weights_SB: Float[Tensor, "S B"]) -> Float[Tensor, " B"]:
    r"""k-hat: the shape of a generalised Pareto fitted to each sequence's largest importance weights.

    Below 0.5 q is good, above `TRUSTED` it misses mass of the posterior (Yao et al. 2018, arXiv 1802.02538). The tail
    is the largest min(S / 5, 3 √S) of the S weights; −∞ where they are equal to a thousandth, as where q is exact up
    to rounding; +∞ where nearly all of them vanish beside the largest.
    """
    samples = len(log_weights_SB)
    tail = int(min(0.2 * samples, 3 * samples**0.5))
    if tail < 5:
        raise UsageError(f"Pareto k-hat needs at least 25 samples, got {samples}: draw more.")
    exact_SB = log_weights_SB.double().cpu()  # double: the tail of a bad q underflows in float32; cpu: by sequence
    sorted_SB = (exact_SB - exact_SB.max(0).values).sort(0).values.exp()
    excess_tB = sorted_SB[-tail:] - sorted_SB[-tail - 1]
    return torch.stack([_shape(excess_t) for excess_t in excess_tB.unbind(1)]).to(log_weights_SB.device)


def _shape(excess_t: Tensor) -> Tensor:
    if not excess_t.isfinite().all():
        return excess_t.new_tensor(torch.nan)
    if excess_t[-1] < 1e-3:
        return excess_t.new_tensor(-torch.inf)
    if excess_t[int(len(excess_t) / 4 - 0.5)] <= 0:  # the quartile that Pyro divides by
        return excess_t.new_tensor(torch.inf)
    return torch.as_tensor(fit_generalized_pareto(excess_t)[0], dtype=excess_t.dtype)
