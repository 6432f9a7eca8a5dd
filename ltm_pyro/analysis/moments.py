"""Means and variances of the thoughts, exact or from draws, and the KL between Gaussians with these moments.

Shapes: S draws, B sequences, L layers, K thoughts, D width.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution


class Moments(NamedTuple):
    """Mean and variance of every coordinate, and the number of independent draws; ∞ if the moments are exact."""

    mean: Float[Tensor, "*B L K D"]
    variance: Float[Tensor, "*B L K D"]
    draws: Float[Tensor, "*B L K D"] | float = math.inf

    @property
    def mcse(self) -> Float[Tensor, "*B L K D"]:
        """The Monte-Carlo standard error of the mean."""
        return (self.variance / self.draws).sqrt()


def exact_moments(distribution: Distribution) -> Moments | None:
    """The moments of a distribution; None if it has no closed form for them."""
    try:
        return Moments(distribution.mean, distribution.variance)
    except (NotImplementedError, AttributeError):
        return None


def sample_moments(
    z_SBLKD: Float[Tensor, "S *B L K D"], independent: Float[Tensor, "*B L K D"] | None = None
) -> Moments:
    """The moments of draws; ``independent`` is their effective sample size if they come from a Markov chain."""
    return Moments(z_SBLKD.mean(0), z_SBLKD.var(0), len(z_SBLKD) if independent is None else independent)


def marginal_kl(q: Moments, p: Moments) -> Float[Tensor, "*B L K D"]:
    r"""The KL between the Gaussians of every coordinate, in nats.

    .. math:: \tfrac12 \left( \log \frac{\sigma_p^2}{\sigma_q^2} + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} - 1
        \right)

    Moments from draws make the estimate too large; the bias is subtracted, to first order in 1 / draws.
    """
    ratio, distance = q.variance / p.variance, (q.mean - p.mean) ** 2 / p.variance
    by_chance = (1 + ratio) / q.draws + 2 * (ratio + distance) / p.draws
    return (ratio + distance - ratio.log() - 1 - by_chance) / 2
