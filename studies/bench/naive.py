"""The published training step, written plainly: the baseline that every figure about speed is compared with.

Every fast step goes backward through all of the decoder, weight gradients included, and their sum is what the slow
step follows; the windowed attention works on a dense T×T mask; logits are one (B, T, V) tensor in float32; nothing that
does not depend on z is cached; q starts at log σ² = −5 and one draw of noise serves all fast steps (arXiv 2502.01567
and the code published with it). Plain torch, none of ours inside.

Shapes: B sequences, T tokens, L layers, K thoughts, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, the mean in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Attention(nn.Module):
    """Multi-head attention of x to a context under a dense mask, rotary positions on both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The heads' outputs, projected."""
        q, k, v = (
            p(y).unflatten(-1, (self.heads, -1)) for p, y in ((self.wq, x), (self.wk, context), (self.wv, context))
        )
        q, k, v = (y.transpose(1, 2) for y in (rotate(q), rotate(k), v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def rotate(x_BTHC: Tensor) -> Tensor:
    """Rotary positions on neighbouring channels, in float32."""
    length, _, channels = x_BTHC.shape[1:]
    position, pair = (torch.arange(0, *x, device=x_BTHC.device) for x in ((length,), (channels, 2)))
    angle = position[:, None] * 10_000.0 ** (-pair / channels)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x_BTHC.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3).type_as(x_BTHC)


class Block(nn.Module):
    """Self-attention, cross-attention and SwiGLU, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 32) * 32
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3))
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """One layer."""
        h = self.norms[0](x)
        x = x + self.self_attention(h, h, mask)
        x = x + self.cross_attention(self.norms[1](x), z, None)
        h = self.norms[2](x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class NaiveLTM(nn.Module):
    """The decoder and its loss."""

    mask: Tensor

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, window: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        self.register_buffer("mask", (distance >= 0) & (distance < window))
        for name, weight in self.named_parameters():  # as our decoder's
            if weight.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, z_BLKD: Tensor) -> Tensor:
        """−log p(x | z) of each sequence, nats."""
        x, length = self.embedding(inputs_BT), inputs_BT.shape[1]
        for block, z in zip(self.blocks, z_BLKD.unbind(1), strict=True):
            x = block(x, z, self.mask[:length, :length])
        logits = F.linear(self.norm(x), self.embedding.weight).float()
        return (
            F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape).sum(1)
        )


def train_step(
    model: NaiveLTM,
    optimizer: torch.optim.Optimizer,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    thoughts: int,
    steps: int,
    rate: float = 0.3,
    clip: float = 1.0,
) -> Tensor:
    """One training step, as published; returns the loss in nats per token that it reports, which is no bound."""
    size, layers, width = len(inputs_BT), len(model.blocks), model.embedding.embedding_dim
    shape, device = (size, layers, thoughts, width), inputs_BT.device
    mean = (0.01 * torch.randn(shape, device=device)).requires_grad_()
    log_var = (-5 + 0.01 * torch.randn(shape, device=device)).requires_grad_()
    noise = torch.randn(shape, device=device)
    local = torch.optim.AdamW([mean, log_var], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(local, steps)

    def loss() -> Tensor:
        z = mean + (0.5 * log_var).exp() * noise
        kl = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum()
        return (model(inputs_BT, targets_BT, z).sum() + kl) / targets_BT.numel()

    optimizer.zero_grad()
    for _ in range(steps):
        local.zero_grad()
        loss().backward()
        local.step()
        schedule.step()
    last = loss()
    last.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return last.detach()
