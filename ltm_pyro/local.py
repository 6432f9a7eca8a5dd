"""Local inference: a few fast gradient steps find each sequence's own posterior while the decoder stands still.

Shapes: B sequences, N fast steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Batch, Guide, LocalParameters, Model, Start, UsageError, seeded
from ltm_pyro.elbo import ElboTerms, average_terms
from ltm_pyro.rates import Rates, cosine, parameter_groups
from ltm_pyro.sites import prior_sites


@dataclass(frozen=True, kw_only=True)
class LocalInference:
    """How q is found (arXiv 2502.01567, algorithm 1, the inner loop).

    Args:
        steps: T_fast, fast steps per fit.
        rate: η_fast, Adam's learning rate on the local parameters.
        schedule: how the rate moves within a fit.
        start: where q begins.
        noise: ``fresh`` draws z anew at every step; ``reused`` repeats one draw through the whole fit, as the published
            code does, for comparison only: its ELBO is no bound.
        slow_gradient: what the decoder follows: the ELBO at the ``last`` q, or its gradient averaged over the
            ``trajectory`` of fast steps.
        particles: draws of z per fast step, averaged.
        kl_weight: multiplies the KL in what q and the decoder climb; 1 is the ELBO.
    """

    steps: int = 16
    rate: float = 0.3
    schedule: Literal["cosine", "constant"] = "cosine"
    start: Start = field(default_factory=Start)
    noise: Literal["fresh", "reused"] = "fresh"
    slow_gradient: Literal["last", "trajectory"] = "trajectory"
    particles: int = 1
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"Fast steps must not be negative, got {self.steps}: choose 0 or more.")
        if self.particles < 1:
            raise UsageError(f"Particles must be at least 1, got {self.particles}: every step needs a draw of z.")

    def loss(self, terms: ElboTerms) -> Float[Tensor, ""]:
        """What is descended: −Σ (log p(x | z) − kl_weight · KL), in nats."""
        return (self.kl_weight * terms.kl_B - terms.log_likelihood_B).sum()

    def factor(self, step: int) -> float:
        """What the rate is multiplied by at a step."""
        return cosine(step, self.steps) if self.schedule == "cosine" else 1.0


class LocalState(NamedTuple):
    """What another fit needs to go on: q's parameters, the optimiser's ``state_dict``, the seed of reused noise."""

    parameters: LocalParameters
    optimizer: dict[str, Any]
    noise: int | None = None


class LocalInfo(NamedTuple):
    """What a person wants to know of a fit: the ELBO's terms before each fast step, in nats per sequence."""

    log_likelihood_NB: Float[Tensor, "N B"]
    kl_NB: Float[Tensor, "N B"]

    @property
    def elbo_NB(self) -> Float[Tensor, "N B"]:
        """log p(x | z) − KL at the draw of each step."""
        return self.log_likelihood_NB - self.kl_NB


def fit(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
) -> tuple[LocalState, LocalInfo]:
    """Finds q for every sequence of a batch; the model's parameters and their ``.grad`` stay untouched.

    Args:
        state: goes on from here instead of ``inference.start``.
        rates: optimiser arguments by name of a local parameter, in place of ``inference.rate``.
    """
    with torch.no_grad():
        batch = batch if batch.stem_BTD is not None else model.prepare(batch)
    with frozen(model):
        return _Climb(model, guide, batch, inference, state, rates).run()


def learn(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
) -> tuple[Float[Tensor, ""], LocalState, LocalInfo]:
    """A fit, and the loss −Σ ELBO (nats) whose ``backward`` gives the global parameters the slow step's gradient.

    With no fast steps, or with nothing local to fit (K = 0), the trajectory is the last q itself.
    """
    prepared = model.prepare(batch)
    climb = _Climb(model, guide, _cut(prepared), inference, state, rates)
    if inference.slow_gradient == "trajectory" and climb.steps:
        average = _AverageGradient(model, climb.batch.stem_BTD, prepared.stem_BTD)
        state, info = climb.run(average)
        return average.loss(inference.loss(ElboTerms(*info)) / len(info.kl_NB)), state, info
    with frozen(model):
        state, info = climb.run()
    return inference.loss(average_terms(model, guide, prepared, state.parameters, inference.particles)), state, info


def _cut(batch: Batch) -> Batch:
    """The batch with its stem cut off from the graph that computed it."""
    stem_BTD = batch.stem_BTD
    return batch if stem_BTD is None else batch._replace(stem_BTD=stem_BTD.detach())


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No global parameter asks for a gradient inside, so that none is computed and no activation kept for it.

    The model is in evaluation mode there: q belongs to the decoder without dropout, and Pyro expects it of frozen
    parameters.
    """
    training = model.training
    model.train(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)


class _Climb:
    """One fit under way: q's parameters, their optimiser, and the record."""

    def __init__(
        self,
        model: Model,
        guide: Guide,
        batch: Batch,
        inference: LocalInference,
        state: LocalState | None,
        rates: Rates | None,
    ) -> None:
        self.model, self.guide, self.batch, self.inference = model, guide, batch, inference
        start = state.parameters if state else guide.start(prior_sites(model, batch.size), inference.start)
        self.local = {name: x.detach().clone().requires_grad_() for name, x in start.items()}
        groups = parameter_groups(self.local.items(), rates or (lambda name: {"lr": inference.rate}))
        self.optimizer = torch.optim.Adam(groups, fused=True)
        if state:
            self.optimizer.load_state_dict(state.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = inference.steps if any(x.numel() for x in self.local.values()) else 0
        self.noise = _noise(inference, state)

    def run(self, average: "_AverageGradient | None" = None) -> tuple[LocalState, LocalInfo]:
        """All fast steps; ``average`` collects the other gradients on the way."""
        record = [self._step(step, average) for step in range(self.steps)]
        empty = self.batch.mask_BT.new_zeros((0, self.batch.size), dtype=torch.float32)
        log_likelihood_NB, kl_NB = (torch.stack(x) for x in zip(*record, strict=True)) if record else (empty, empty)
        parameters = {name: x.detach() for name, x in self.local.items()}
        state = LocalState(parameters, self.optimizer.state_dict(), self.noise)
        return state, LocalInfo(log_likelihood_NB, kl_NB)

    def _step(self, step: int, average: "_AverageGradient | None") -> tuple[Tensor, Tensor]:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.inference.factor(step)
        local = list(self.local.values())
        with torch.enable_grad(), nullcontext() if self.noise is None else seeded(self.noise):
            terms = average_terms(self.model, self.guide, self.batch, self.local, self.inference.particles)
            wanted = local + average.tensors if average else local
            gradients = torch.autograd.grad(self.inference.loss(terms), wanted, allow_unused=average is not None)
        for parameter, gradient in zip(local, gradients, strict=False):
            parameter.grad = gradient
        if average:
            average.add(gradients[len(local) :])
        self.optimizer.step()
        return terms.log_likelihood_B.detach(), terms.kl_B.detach()


def _noise(inference: LocalInference, state: LocalState | None) -> int | None:
    if inference.noise == "fresh":
        return None
    return state.noise if state and state.noise is not None else int(torch.randint(2**62, ()))


class _AverageGradient:
    """The global parameters' gradient averaged over a trajectory, with the stem's part sent back only once."""

    def __init__(self, model: Model, leaf_BTD: Tensor | None, stem_BTD: Tensor | None) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stem = [] if stem_BTD is None else [stem_BTD]
        self.tensors = self.parameters + ([] if leaf_BTD is None else [leaf_BTD.requires_grad_()])
        self.sums = [torch.zeros_like(x) for x in self.tensors]
        self.count = 0

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One more point of the trajectory."""
        self.count += 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def loss(self, value: Tensor) -> Tensor:
        """``value``, whose backward gives every parameter the average gradient."""
        known = self.sums[: len(self.parameters)]
        if self.stem:
            through = torch.autograd.grad(self.stem, self.parameters, self.sums[-1:], allow_unused=True)
            known = [a if b is None else a + b for a, b in zip(known, through, strict=True)]
        return _WithGradient.apply(value, [x / self.count for x in known], *self.parameters)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``parameters`` is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * x for x in ctx.gradients)
