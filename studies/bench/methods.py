"""The training steps that are compared: ours, ours by hand without Pyro, and the published structure."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ltm_pyro.contracts import Init, make_batch
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.learning_rates import cosine
from ltm_pyro.inference.local import frozen, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.nn.cross_entropy import LateGradient, token_nats
from ltm_pyro.studies.bench.naive import NaiveLTM, train_step
from ltm_pyro.studies.bench.settings import Setting

RATE, CLIP = 0.3, 1.0
INIT = Init(log_var=-5.0, jitter=0.01)


Kind = Literal["ours", "handwritten", "naive"]
Precision = Literal["float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "xformers", "flex", "dense"]


class Method(NamedTuple):
    """One way to take a training step, as `make_step` builds it."""

    kind: Kind
    precision: Precision
    compiled: bool = False
    attention: Attention = "auto"
    graph: bool = False  # the fast steps as a CUDA graph

    def __str__(self) -> str:
        more = [*[self.attention] * (self.attention != "auto"), *["graph"] * self.graph]
        return " ".join([self.kind, self.precision, *more, *["compiled"] * self.compiled])


def make_step(method: Method, setting: Setting, device: str = "cpu") -> Callable[[], None]:
    """A function that takes one training step on random tokens."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(1, setting.vocabulary, (setting.batch, setting.length + 1), device=device)
    inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
    kind = {"ours": _ours, "handwritten": _handwritten, "naive": _naive}[method.kind]
    with torch.device(device):
        step = kind(method, setting, inputs_BT, targets_BT)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=method.precision == "bfloat16"):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _decoder(method: Method, setting: Setting) -> Decoder:
    decoder = Decoder(
        vocabulary=setting.vocabulary,
        layers=setting.layers,
        width=setting.width,
        heads=setting.heads,
        thoughts=setting.thoughts,
        window=setting.window,
        length=setting.length,
        attention=method.attention,
    )
    if method.compiled:
        decoder.compile()
    return decoder


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _slow_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def _ours(method: Method, setting: Setting, inputs_BT: Tensor, targets_BT: Tensor) -> Callable[[], Any]:
    decoder = _decoder(method, setting)
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    guide, optimizer = MeanField(model), _adamw(model)
    inference = LocalInference(steps=setting.steps, rate=RATE, init=INIT, slow_gradient="last", cuda_graph=method.graph)
    lengths_B = torch.full((setting.batch,), setting.length)
    batch = make_batch(targets_BT, lengths_B, start_token=0)._replace(inputs_BT=inputs_BT)
    return lambda: _slow_step(model, optimizer, training_loss(model, guide, batch, inference).loss / setting.tokens)


def _handwritten(method: Method, setting: Setting, inputs_BT: Tensor, targets_BT: Tensor) -> Callable[[], Any]:
    """What `ltm_pyro.inference.local.training_loss` does for the paper's prior and guide, in a bare loop."""
    decoder = _decoder(method, setting)
    optimizer, shape = _adamw(decoder), (setting.batch, *decoder.thought_shape)

    def loss(stem_BTD: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        z_BLKD = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        embedding_VD = decoder.embedding.weight
        late = LateGradient.of(embedding_VD, targets_BT.shape)
        nats = token_nats(decoder(stem_BTD, z_BLKD), embedding_VD, targets_BT, late).sum()
        return nats + 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum()

    def step() -> None:
        stem_BTD = decoder.stem(inputs_BT)
        mean = (INIT.jitter * torch.randn(shape, device=inputs_BT.device)).requires_grad_()
        log_var = torch.full_like(mean, INIT.log_var).requires_grad_()
        local = torch.optim.Adam([mean, log_var], lr=RATE, fused=True)
        with frozen(decoder):
            for fast in range(setting.steps):
                local.param_groups[0]["lr"] = RATE * cosine(fast, setting.steps)
                mean.grad, log_var.grad = torch.autograd.grad(loss(stem_BTD.detach(), mean, log_var), [mean, log_var])
                local.step()
        _slow_step(decoder, optimizer, loss(stem_BTD, mean.detach(), log_var.detach()) / setting.tokens)

    return step


def _naive(method: Method, setting: Setting, inputs_BT: Tensor, targets_BT: Tensor) -> Callable[[], Any]:
    sizes = (setting.vocabulary, setting.layers, setting.width, setting.heads, setting.window, setting.length)
    model = NaiveLTM(*sizes)
    if method.compiled:
        model.compile()
    optimizer = _adamw(model)
    return lambda: train_step(model, optimizer, inputs_BT, targets_BT, setting.thoughts, setting.steps, RATE, CLIP)
