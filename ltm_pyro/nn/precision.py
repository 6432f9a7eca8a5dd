"""Mixed precision: half precision for the decoder's matrix products, never for thoughts, densities and KL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ltm_pyro.contracts import Model


def full_precision(like: Tensor) -> torch.autocast:
    """Turns autocast off on the device of ``like``, because a KL is a small difference of large numbers."""
    return torch.autocast(like.device.type, enabled=False)


def matrix_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's on x's device, or x's own if autocast is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def cast_weights(model: Model | nn.Module) -> Iterator[None]:
    """Inside, the matrices of modules with ``half_precision = True`` are cast to autocast's type.

    Autocast itself would cast frozen weights at every product, because it caches only weights that require a gradient.
    """
    parts = [part for part in model.modules() if getattr(part, "half_precision", False)]
    weights = [m.weight for part in parts for m in part.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    with swap_data(weights, [w.data.to(matrix_dtype(w)) for w in weights]):
        yield


@contextmanager
def swap_data(weights: Sequence[Tensor], data: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the ``.data`` of the weights is replaced by ``data``; afterwards it is restored."""
    original = [w.data for w in weights]
    try:
        for weight, x in zip(weights, data, strict=True):
            weight.data = x
        yield
    finally:
        for weight, x in zip(weights, original, strict=True):
            weight.data = x
