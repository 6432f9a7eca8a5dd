"""Means and variances of the thoughts, exact or from draws, and the KL of Gaussians that have them.

Shapes: S draws, B sequences, L layers, K thoughts, D width.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution


class Moments(NamedTuple):
    """Mean and variance of every coordinate, and of how many independent draws; ∞ where they are in closed form."""

    mean: Float[Tensor, "*B L K D"]
    variance: Float[Tensor, "*B L K D"]
    draws: Float[Tensor, "*B L K D"] | float = math.inf

    @property
    def mcse(self) -> Float[Tensor, "*B L K D"]:
        """The Monte-Carlo standard error of the mean."""
        return (self.variance / self.draws).sqrt()


def closed_form(distribution: Distribution) -> Moments | None:
    """The moments that a distribution knows of itself, if it does."""
    try:
        return Moments(distribution.mean, distribution.variance)
    except (NotImplementedError, AttributeError):
        return None


def of_draws(z_SBLKD: Float[Tensor, "S *B L K D"], independent: Float[Tensor, "*B L K D"] | None = None) -> Moments:
    """The draws' moments; ``independent`` is what they are worth in draws where they follow each other in a chain."""
    return Moments(z_SBLKD.mean(0), z_SBLKD.var(0), len(z_SBLKD) if independent is None else independent)


def marginal_kl(q: Moments, p: Moments) -> Float[Tensor, "*B L K D"]:
    r"""The KL of every coordinate's Gaussian, in nats.

    .. math:: \tfrac12 \left( \log \frac{\sigma_p^2}{\sigma_q^2} + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} - 1
        \right)

    Noise in moments from draws would add to it; what it adds on average is taken off, to first order in 1 / draws.
    """
    ratio, distance = q.variance / p.variance, (q.mean - p.mean) ** 2 / p.variance
    by_chance = (1 + ratio) / q.draws + 2 * (ratio + distance) / p.draws
    return (ratio + distance - ratio.log() - 1 - by_chance) / 2
