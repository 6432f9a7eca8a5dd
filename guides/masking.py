"""The noising process of masked diffusion is its guide: it does not depend on the text and learns nothing."""

from typing import ClassVar

import pyro
from torch import Tensor

from ltm_pyro.contracts import Batch, LocalParameters, sequence_plate
from ltm_pyro.guides.mean_field import MeanField
from ltm_pyro.inference.masking import ORDER, SHARE, StratifiedUniform, mask_laws


class Masking(MeanField):
    r"""q(masks) = p(masks): how many tokens are masked is uniform on 1 … n, and so is which.

    It is the q of `ltm_pyro.models.MaskedDiffusionModel`, and of no other model. There are no local parameters, no fast
    steps and no KL. The number of masked tokens is stratified: over the sequences of a batch in training, and over
    every 8 draws of a sequence where each has a random stream of its own.
    """

    uses_fast_steps: ClassVar[bool] = False
    strata: ClassVar[int] = StratifiedUniform.STRATA

    def __call__(self, batch: Batch, local: LocalParameters) -> dict[str, Tensor]:
        """Samples which tokens are masked."""
        sampled = super().__call__(batch, local)
        laws = mask_laws(batch, next(iter(local.values())))
        with sequence_plate(batch.size):
            return sampled | {name: pyro.sample(name, laws[name]) for name in (SHARE, ORDER)}
