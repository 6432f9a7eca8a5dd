"""Antithetic sampling as a Pyro handler."""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from ltm_pyro.contracts import PARTICLES, SEQUENCES
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.row_noise import RowNoise


class Antithetic(Messenger):
    """Draws from a Gaussian guide in antithetic pairs: the noise z − μ of the second half is minus that of the first.

    The average over particles of any odd function of z − μ is then exactly 0. The mean of a site may depend on the
    sites before it, and then differs between the two of a pair.

    Args:
        noise: the sequences' own random streams; by default torch's generator.
    """

    def __init__(self, noise: RowNoise | None = None) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        plates = {frame.name for frame in msg["cond_indep_stack"]}
        if plates >= {PARTICLES, SEQUENCES} and msg["value"] is None:
            msg["value"] = antithetic_sample(msg["fn"], msg["name"], self.noise)


def antithetic_sample(fn: Distribution, name: str, noise: RowNoise | None = None) -> Tensor:
    """A reparameterised sample whose second half along axis 0 is the first half mirrored at the mean."""
    if isinstance(fn, TransformedDistribution):
        x = antithetic_sample(fn.base_dist, name, noise)
        for transform in fn.transforms:
            x = transform(x)
        return x
    base = fn
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise UsageError(f"Antithetic noise needs a Gaussian guide, but site '{name}' is {base}: use fresh noise.")
    if any(x.stride(0) for x in _spread(base)):  # 0 where one value stands for all particles
        raise UsageError(
            f"Antithetic noise needs one spread for all particles, but that of site '{name}' depends on other sites: "
            f"use fresh noise."
        )
    z = (noise.sample(fn, name) if noise else fn.rsample())[: fn.batch_shape[0] // 2]
    return torch.cat([z, fn.mean[: len(z)] + fn.mean[len(z) :] - z])


def _spread(normal: Normal | MultivariateNormal | LowRankMultivariateNormal) -> tuple[Tensor, ...]:
    """What a Gaussian has beside its mean, each with the batch's axes first."""
    if isinstance(normal, Normal):
        return (normal.scale,)
    if isinstance(normal, MultivariateNormal):
        return (normal._unbroadcasted_scale_tril.expand(*normal.batch_shape, *[-1] * 2),)
    factor, diagonal = normal._unbroadcasted_cov_factor, normal._unbroadcasted_cov_diag
    return factor.expand(*normal.batch_shape, *[-1] * 2), diagonal.expand(*normal.batch_shape, -1)
