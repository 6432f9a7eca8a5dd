"""Local inference: a few fast gradient steps find each sequence's own posterior while the decoder stands still.

Shapes: B sequences, b of them, N fast steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ltm_pyro.contracts import Batch, Guide, Init, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.cuda_graphs import recordings
from ltm_pyro.inference.elbo import ElboTerms, average_terms, no_param_store
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.learning_rates import Rates
from ltm_pyro.inference.optimizers import OPTIMIZERS, Groups, Rate, Update
from ltm_pyro.inference.state import LocalInference, LocalInfo, LocalState, Stop
from ltm_pyro.inference.trajectory_gradient import TrajectoryGradient
from ltm_pyro.nn.precision import rounded
from ltm_pyro.utils.rng import seeded

OnStep = Callable[[int, LocalParameters, ElboTerms], None]  # step, q's parameters before it, the ELBO's terms there


@no_param_store()
def infer_local(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
    on_step: OnStep | None = None,
) -> tuple[LocalState, LocalInfo]:
    """Finds q for every sequence of a batch; the model's parameters and their ``.grad`` stay untouched.

    Args:
        state: goes on from here instead of ``inference.start``.
        rates: optimiser arguments by name of a local parameter, in place of ``inference.rate``.
        on_step: is called before every fast step with the sequences that still move.
    """
    with torch.no_grad():
        batch = batch if batch.stem_BTD is not None else model.prepare(batch)
    with frozen(model):
        state, info = _Climb(model, guide, inference, rates, on_step).run(batch, state)
    return state._replace(parameters={name: x.detach() for name, x in state.parameters.items()}), info


@no_param_store()
def init(model: Model, guide: Guide, batch: Batch, inference: LocalInference) -> LocalState:
    """The state before the first fast step: q at ``inference.start``."""
    start = guide.init(prior_sites(model, batch.size), inference.init)
    if wrong := {name: tuple(x.shape) for name, x in start.items() if x.shape[:1] != (batch.size,)}:
        raise UsageError(
            f"{type(guide).__name__}.start gives {wrong}: the first axis of every local parameter has to be the "
            f"{batch.size} sequences of the batch."
        )
    moments = {name: OPTIMIZERS[inference.optimizer].init(x) for name, x in start.items()}
    steps_B = torch.zeros(batch.size, dtype=torch.long, device=batch.inputs_BT.device)
    return LocalState({name: x.detach() for name, x in start.items()}, moments, steps_B)


class TrainingLoss(NamedTuple):
    """What the slow step needs: the loss to go backward from, the fit, and the ELBO's terms at the last q it saw."""

    loss: Float[Tensor, ""]
    state: LocalState
    info: LocalInfo
    terms: ElboTerms

    @property
    def is_finite_B(self) -> Bool[Tensor, " B"]:
        """Whether every ELBO of a sequence was finite."""
        return self.info.finite_B & self.terms.elbo_B.isfinite()


@no_param_store()
def training_loss(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
) -> TrainingLoss:
    """A fit, and the loss −Σ ELBO (nats) whose ``backward`` gives the global parameters the slow step's gradient.

    With no fast steps, or with nothing local to fit (K = 0), the trajectory is the last q itself.
    """
    if inference.cuda_graph and inference.slow_gradient == "trajectory":
        raise UsageError("A CUDA graph cannot record the slow gradient of a trajectory: set slow_gradient to last.")
    prepared = model.prepare(batch)
    climb, cut = _Climb(model, guide, inference, rates), _cut(prepared)
    if inference.slow_gradient == "trajectory":
        climb.average = TrajectoryGradient(model, guide, cut.stem_BTD, prepared.stem_BTD)
        state, info = climb.run(cut, state)
        if len(info.kl_NB):
            loss = inference.loss(ElboTerms(info.log_likelihood_NB, info.kl_NB)) / len(info.kl_NB)
            last = ElboTerms(info.log_likelihood_NB[-1], info.kl_NB[-1])
            return TrainingLoss(climb.average.loss(loss), state, info, last)
    else:
        with frozen(model):
            state, info = climb.run(cut, state)
    terms = average_terms(model, guide, prepared, state.parameters, inference.draws)
    return TrainingLoss(inference.loss(terms), state, info, ElboTerms(*(x.detach() for x in terms)))


def _cut(batch: Batch) -> Batch:
    """The batch with its stem cut off from the graph that computed it."""
    stem_BTD = batch.stem_BTD
    return batch if stem_BTD is None else batch._replace(stem_BTD=stem_BTD.detach())


@contextmanager
def frozen(model: Model | nn.Module) -> Iterator[None]:
    """No global parameter asks for a gradient inside, so that none is computed and no activation kept for it.

    The model is in evaluation mode there: q belongs to the decoder without dropout, and Pyro expects it of frozen
    parameters. Matrices are rounded to autocast's precision once. Parts with an attribute ``frozen`` read it there.
    """
    training = model.training
    model.train(False)
    moving: list[Any] = [part for part in model.modules() if getattr(part, "frozen", None) is False]
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    for part in moving:
        part.frozen = True
    try:
        with rounded(model):
            yield
    finally:
        for part in moving:
            part.frozen = False
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)


class _Climb:
    """A fit: state in, state out, over stretches of steps between which settled sequences are let go."""

    def __init__(
        self, model: Model, guide: Guide, inference: LocalInference, rates: Rates | None, on_step: OnStep | None = None
    ) -> None:
        self.model, self.guide, self.inference, self.on_step = model, guide, inference, on_step
        self.optimizer = OPTIMIZERS[inference.optimizer]
        self.rates: Rates = rates or (lambda name: {"lr": 1.0})
        self.rate = 1.0 if rates else inference.rate  # multiplies them
        self.average: TrajectoryGradient | None = None

    def run(self, batch: Batch, state: LocalState | None) -> tuple[LocalState, LocalInfo]:
        """All fast steps of a batch."""
        inference, guide = self.inference, self.guide
        state = self._begin(batch, state)
        steps = inference.steps if any(x.numel() for x in state.parameters.values()) else 0
        state, info = self._climb(batch, state, steps if guide.uses_fast_steps else 0)
        if not steps:
            return state, info
        with frozen(self.model) if self.average else nullcontext():  # elsewhere it is frozen from the first step on
            found = guide.finalize(self.model, _cut(batch), state.parameters, steps, inference.rate)
        return state._replace(parameters=found), info

    def _climb(self, batch: Batch, state: LocalState, steps: int) -> tuple[LocalState, LocalInfo]:
        if self.inference.stop is None:
            state, record = self._recorded(batch, state, range(steps))
            return state, LocalInfo(*_stack(record, batch), torch.full_like(state.steps_B, steps))
        return self._climb_until_settled(batch, state, self.inference.stop, steps)

    def _climb_until_settled(
        self, batch: Batch, state: LocalState, stop: Stop, steps: int
    ) -> tuple[LocalState, LocalInfo]:
        if self.average is not None:
            raise UsageError("The stopping rule needs the slow gradient of the last step: set slow_gradient to last.")
        moving_b = torch.arange(batch.size, device=batch.inputs_BT.device)
        first_B, before_B = state.steps_B, torch.full((batch.size,), -torch.inf, device=moving_b.device)
        whole_2NB = torch.full((2, steps, batch.size), torch.nan, device=moving_b.device)
        for first in range(0, steps, stop.window):
            stretch = range(first, min(first + stop.window, steps))
            moved, record = self._stretch(batch.select(moving_b), state.select(moving_b), stretch, self.rate)
            state, terms = state.put(moving_b, moved), torch.stack(_stack(record, batch))
            whole_2NB[:, first : stretch.stop, moving_b] = terms.to(whole_2NB.dtype)
            now_b = (terms[0] - terms[1]).mean(0).to(before_B.dtype)
            going_b = ~(now_b - before_B[moving_b] < stop.tolerance)
            before_B[moving_b] = now_b
            moving_b = moving_b[going_b]
            if not len(moving_b):
                break
        return state, LocalInfo(whole_2NB[0], whole_2NB[1], state.steps_B - first_B)

    def _begin(self, batch: Batch, state: LocalState | None) -> LocalState:
        if state is None:
            state = init(self.model, self.guide, batch, self.inference)
        else:
            climbing = {name: x for name, x in state.parameters.items() if name in state.moments}
            state = state._replace(parameters=climbing)  # without what `settle` added
            check_state(self.model, self.guide, batch, state)
            if any(set(m) != set(self.optimizer.moments) for m in state.moments.values()):
                raise UsageError(
                    f"The local state comes from another optimizer than {self.inference.optimizer}: "
                    f"go on with the one it was fitted with, or fit anew."
                )
        if self.inference.noise != "reused":
            return state._replace(noise=None)
        return state if state.noise is not None else state._replace(noise=int(torch.randint(2**62, ())))

    def _recorded(self, batch: Batch, state: LocalState, steps: range) -> tuple[LocalState, list[ElboTerms]]:
        """`_stretch`, recorded as a CUDA graph where that is asked for, unless somebody follows the steps."""
        if not (self.inference.cuda_graph and steps) or self.on_step:
            return self._stretch(batch, state, steps, self.rate)
        rate = torch.full((), self.rate, device=batch.inputs_BT.device)  # may change at every fit
        key = replace(self.inference, rate=1.0, init=Init()), repr([self.rates(name) for name in state.parameters])
        weights = [x for part in (self.model, self.guide) if isinstance(part, nn.Module) for x in _tensors(part)]
        recorded = recordings(self.guide, rate.device)
        return recorded(key, self._stretch, (batch, state, steps, rate), weights)

    def _stretch(self, batch: Batch, state: LocalState, steps: range, rate: Rate) -> tuple[LocalState, list[ElboTerms]]:
        """Some consecutive steps of some sequences, without waiting for the device."""
        record, groups = [], Groups(state.parameters, self.rates)
        joined = _regrouped(state, groups.join)
        for step, updates in zip(steps, self._updates(joined, groups, len(steps)), strict=True):
            local = groups.split(joined.parameters)
            terms, gradients = self._gradients(batch, local, state.noise)
            if self.on_step:
                self.on_step(step, local, terms)
            joined = _moved(joined, groups.join(gradients), updates, rate * self.inference.factor(step))
            record.append(terms)
        joined = joined._replace(steps_B=state.steps_B + len(steps))
        return _regrouped(joined, lambda whole: {n: x.contiguous() for n, x in groups.split(whole).items()}), record

    def _gradients(self, batch: Batch, local: LocalParameters, noise: int | None) -> tuple[ElboTerms, LocalParameters]:
        leaves = {name: x.detach().requires_grad_() for name, x in local.items()}
        others = self.average.tensors if self.average else []
        with torch.enable_grad(), nullcontext() if noise is None else seeded(noise):
            terms = average_terms(self.model, self.guide, batch, leaves, self.inference.draws)
            wanted = [*leaves.values(), *others]
            gradients = torch.autograd.grad(self.inference.loss(terms), wanted, allow_unused=True)
        if self.average:
            self.average.add(gradients[len(local) :])
        found = {
            name: torch.zeros_like(x) if gradient is None else gradient
            for (name, x), gradient in zip(local.items(), gradients, strict=False)
        }
        if self.inference.optimizer == "natural":
            found = self.guide.natural_gradient(local, found)
        return ElboTerms(*(x.detach() for x in terms)), found

    def _updates(self, state: LocalState, groups: Groups, steps: int) -> Iterator[dict[str, Update]]:
        """Of every group, for each of the next steps."""
        counts_NB = state.steps_B + torch.arange(1, steps + 1, device=state.steps_B.device)[:, None]
        by_group = {
            group: self.optimizer.updates(counts_NB.to(x.dtype), **groups.arguments[group])
            for group, x in state.parameters.items()
        }
        return (dict(zip(by_group, step, strict=True)) for step in zip(*by_group.values(), strict=True))


def _moved(state: LocalState, gradients: LocalParameters, updates: dict[str, Update], rate: Rate) -> LocalState:
    parameters, moments = {}, {}
    for group, x in state.parameters.items():
        parameters[group], moments[group] = updates[group](x, gradients[group], state.moments[group], rate)
    return state._replace(parameters=parameters, moments=moments)


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _regrouped(state: LocalState, regroup: Callable[[LocalParameters], LocalParameters]) -> LocalState:
    """The state with its parameters and moments joined or split."""
    kinds = {kind for moments in state.moments.values() for kind in moments}
    by_kind = {kind: regroup({name: m[kind] for name, m in state.moments.items()}) for kind in sorted(kinds)}
    parameters = regroup(state.parameters)
    moments = {name: {kind: by_kind[kind][name] for kind in by_kind} for name in parameters}
    return state._replace(parameters=parameters, moments=moments)


def _stack(record: list[ElboTerms], batch: Batch) -> tuple[Tensor, Tensor]:
    if not record:
        empty_NB = batch.mask_BT.new_zeros((0, batch.size), dtype=torch.get_default_dtype())
        return empty_NB, empty_NB
    return torch.stack([t.log_likelihood_B for t in record]), torch.stack([t.kl_B for t in record])


def check_state(model: Model, guide: Guide, batch: Batch, state: LocalState) -> None:
    """Refuses a local state of another guide, another model or another batch."""
    with seeded(0):
        own = guide.init(prior_sites(model, 1), Init())
    expected = {name: (batch.size, *x.shape[1:]) for name, x in own.items()}
    given = {name: tuple(x.shape) for name, x in state.parameters.items()}
    if expected != given:
        raise UsageError(
            f"The local state has parameters {given}, but this guide, model and batch need {expected}: "
            f"fit it anew, or select the batch's sequences from it."
        )
