"""Where half precision begins and ends: matrix products of the decoder, never thoughts, densities and KL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ltm_pyro.contracts import Model


def full_precision(like: Tensor) -> torch.autocast:
    """Inside, autocast is off on the device of ``like``: a KL is a small difference of large numbers."""
    return torch.autocast(like.device.type, enabled=False)


def matrix_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x is computed in: autocast's type on x's device, outside autocast x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def rounded(model: Model | nn.Module) -> Iterator[None]:
    """Inside, matrices of parts that call themselves ``half_precision`` are rounded as autocast would at every product.

    For as long as they stand still: autocast itself remembers rounded weights only while they learn.
    """
    parts = [part for part in model.modules() if getattr(part, "half_precision", False)]
    weights = [m.weight for part in parts for m in part.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    with holding(weights, [w.data.to(matrix_dtype(w)) for w in weights]):
        yield


@contextmanager
def holding(weights: Sequence[Tensor], data: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the weights hold other data, in another place."""
    own = [w.data for w in weights]
    try:
        for weight, other in zip(weights, data, strict=True):
            weight.data = other
        yield
    finally:
        for weight, other in zip(weights, own, strict=True):
            weight.data = other
