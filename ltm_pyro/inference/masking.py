"""The noise of masked diffusion: how many tokens of a text are masked, and which.

Shapes: B sequences, T tokens, S draws.
"""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ltm_pyro.contracts import Batch

SHARE, ORDER = "mask_share", "mask_order"  # the sites that a model and a guide of masked diffusion have in common


class StratifiedUniform(dist.Uniform):
    """Uniform from 0 to 1; the cells of a sample are spread evenly, each of them uniform by itself.

    A sample without streams of the rows' own is one set of strata over all its cells, such as the sequences of a batch.
    Where every row has a stream of its own, `STRATA` consecutive draws of a row are a set (`of_rows`), so that what is
    drawn for a row does not depend on the rest of its batch.
    """

    STRATA: ClassVar[int] = 8

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Uniform numbers, one in each of as many equal parts of the unit interval as there are cells."""
        shape = self._extended_shape(torch.Size(sample_shape))
        offset = torch.rand((), dtype=self.low.dtype, device=self.low.device)
        strata = torch.arange(shape.numel(), dtype=self.low.dtype, device=self.low.device) / max(shape.numel(), 1)
        return ((offset + strata) % 1).view(shape)

    @classmethod
    def of_rows(cls, uniform: Float[Tensor, "*S B"], number: Int[Tensor, "*S 1"]) -> Float[Tensor, "*S B"]:
        """The draws of some numbers, from one uniform number for each row and set of `STRATA` draws."""
        return (uniform + (number % cls.STRATA) / cls.STRATA) % 1


def mask_laws(batch: Batch, like: Tensor) -> dict[str, Any]:
    """The distributions of `SHARE` and `ORDER` of each sequence, whatever the text is.

    Args:
        like: of the dtype and on the device of the samples.
    """
    low, high = like.new_zeros(()), like.new_ones(())
    order = dist.Uniform(low, high).expand([batch.mask_BT.shape[1]])
    return {SHARE: StratifiedUniform(low, high), ORDER: order.to_event(1)}


def choose_masked(
    share_B: Float[Tensor, "*B"], order_BT: Float[Tensor, "*B T"], maskable_BT: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "*B T"], Float[Tensor, "*B"]]:
    r"""The masked tokens, and n / m: m of the n that may be masked, the first in their random order.

    .. math:: m = 1 + \lfloor n \, u \rfloor, \quad u \sim \mathrm{Uniform}(0, 1)

    so that m is uniform on 1 … n, and given m every subset of m tokens is as likely.
    """
    n_B = maskable_BT.sum(-1)
    m_B = (1 + (n_B * share_B).floor().long()).minimum(n_B.clamp(min=1))
    rank_BT = order_BT.masked_fill(~maskable_BT, torch.inf).argsort(-1).argsort(-1)
    return (rank_BT < m_B[..., None]) & maskable_BT, n_B / m_B
