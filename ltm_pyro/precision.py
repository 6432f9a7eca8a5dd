"""Where half precision begins and ends: matrix products of the decoder, never thoughts, densities and KL."""

from collections.abc import Iterator
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
    exact = [w.data for w in weights]
    for weight in weights:
        weight.data = weight.data.to(matrix_dtype(weight))
    try:
        yield
    finally:
        for weight, data in zip(weights, exact, strict=True):
            weight.data = data
