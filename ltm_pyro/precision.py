"""Where half precision ends: thoughts, densities and KL are computed as their tensors are, also under autocast."""

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """Inside, autocast is off on the device of ``like``: a KL is a small difference of large numbers."""
    return torch.autocast(like.device.type, enabled=False)
