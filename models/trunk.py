"""What the networks of p(x | z) have in common: initialisation, embeddings, and which sizes fit together.

Shapes: B sequences, T tokens, D width.
"""

import os

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ltm_pyro.errors import UsageError


def init_weights(network: nn.Module, layers: int, zero_init_cross_attention: bool = False) -> None:
    """N(0, 1 / fan-in); weights that add to the residual stream are smaller by √(2L), as in GPT-2.

    GPT-2's fixed standard deviation of 0.02 is far too small at small widths: after 250 steps a decoder of width 64 had
    a loss of 5.3 nats per token with it, and of 4.6 with this rule and the learning rate that it allows.
    """
    for name, weight in network.named_parameters():
        if weight.dim() == 2:
            residual = name.endswith(("output.weight", "down.weight"))
            nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)
        if zero_init_cross_attention and name.endswith("cross_attention.output.weight"):
            nn.init.zeros_(weight)


def check_size(vocabulary: int, layers: int, width: int, positions: int) -> None:
    """Refuses weights that this machine has no memory for, before it is used up."""
    if torch.get_default_device().type == "meta":  # where nothing is stored
        return
    size = 4 * width * (vocabulary + 12 * layers * width + positions)  # bytes, about
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UsageError(
            f"A decoder of {layers} layers, width {width}, {vocabulary} tokens and {positions} positions needs "
            f"{size / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}: make it smaller."
        )


def check_heads(width: int, heads: int, kv_heads: int) -> None:
    """Refuses heads that do not divide the width."""
    if min(width, heads, kv_heads) < 1:
        raise UsageError(f"Width, heads and kv_heads must be at least 1, got {width}, {heads} and {kv_heads}.")
    if width % (2 * heads):
        raise UsageError(f"Width {width} is not a multiple of 2 x heads = {2 * heads}: change `width` or `heads`.")
    if heads % kv_heads:
        raise UsageError(f"kv_heads {kv_heads} does not divide heads {heads}: choose a divisor for `kv_heads`.")


def embed(embedding: nn.Embedding, tokens_BT: Int[Tensor, "B T"], length: int) -> Float[Tensor, "B T D"]:
    """The tokens' embeddings, with a gradient of the rows in use and not of V x D.

    Raises `UsageError` for a sequence that is too long, or on another device than the network.
    """
    if tokens_BT.shape[1] > length:
        raise UsageError(
            f"A sequence has {tokens_BT.shape[1]} tokens, but the model's length is {length}: "
            f"cut the text, or train with a larger `length`."
        )
    weight_VD = embedding.weight
    if tokens_BT.device != weight_VD.device:
        raise UsageError(
            f"The batch is on {tokens_BT.device}, but the model on {weight_VD.device}: "
            f'move one of them, such as batch.to("{weight_VD.device}").'
        )
    return F.embedding(tokens_BT, weight_VD, sparse=True)
