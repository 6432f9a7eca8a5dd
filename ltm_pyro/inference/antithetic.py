"""How z is drawn in the fast loop, as Pyro handlers: once more for every step, the same again, or in mirrored pairs."""

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


class Antithetic(Messenger):
    """Draws of a Gaussian guide in mirrored pairs: the second half of the particles is 2μ − z of the first half.

    Everything odd in z − μ then cancels exactly in an average over particles.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        plates = {frame.name for frame in msg["cond_indep_stack"]}
        if plates >= {PARTICLES, SEQUENCES} and msg["value"] is None:
            msg["value"] = mirrored(msg["fn"], msg["name"])


def mirrored(fn: Distribution, name: str) -> Tensor:
    """A reparameterised draw whose second half along axis 0 mirrors the first half."""
    if isinstance(fn, TransformedDistribution):
        x = mirrored(fn.base_dist, name)
        for transform in fn.transforms:
            x = transform(x)
        return x
    if not isinstance(_base(fn), Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise UsageError(f"Antithetic noise needs a Gaussian guide, but site '{name}' is {_base(fn)}: use fresh noise.")
    half = fn.rsample()[: fn.batch_shape[0] // 2]
    return torch.cat([half, 2 * fn.mean[: len(half)] - half])


def _base(fn: Distribution) -> Distribution:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn
