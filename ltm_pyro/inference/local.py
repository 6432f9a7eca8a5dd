"""Local inference: Algorithm 1 of arXiv 2502.01567, the fast loop that finds each sequence's own posterior.

`init` creates every sequence's q, `step` updates all of them once, and three drivers repeat it: `run_steps` (all
steps), `run_until_converged` (early stopping) and `run_cuda_graph`. `infer_local` and `training_loss` are the entry
points for evaluation and training. Shapes: B sequences, b of them still active, N fast steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ltm_pyro.contracts import Batch, Guide, Init, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.cuda_graphs import graph_cache
from ltm_pyro.inference.elbo import Draws, ElboTerms, elbo_terms
from ltm_pyro.inference.global_latents import fix_draws_by_keys, global_draws
from ltm_pyro.inference.latent_sites import Sites, prior_sites
from ltm_pyro.inference.learning_rates import LOCAL, Rates
from ltm_pyro.inference.optimizers import OPTIMIZERS, Rate, Update
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise, keyed
from ltm_pyro.inference.starts import POOL, SCORING, SEVERAL, has_several_modes, sites_at_a_draw
from ltm_pyro.inference.state import LocalInference, LocalInfo, LocalState, Stop
from ltm_pyro.inference.trajectory_gradient import TrajectoryGradient
from ltm_pyro.nn.precision import cast_weights
from ltm_pyro.utils.rng import seeded


def infer_local(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
    keys: RowKeys | None = None,
) -> tuple[LocalState, LocalInfo]:
    """Fits q to every sequence of a batch; the model's parameters and their ``.grad`` do not change.

    Args:
        state: the state to continue from; by default q is initialised by ``inference.init``.
        rates: optimiser arguments by name of a local parameter (``local.z_loc``), instead of ``inference.rate``.
        keys: of the sequences' own random streams, so that q of a sequence does not depend on the rest of its batch; by
            default those of ``state``, else all noise comes from torch's generator.
    """
    keys = keys or (state and state.keys)
    with no_param_store(model), fix_draws_by_keys(model, keys):
        with torch.no_grad():
            batch = (batch if batch.stem_BTD is not None else model.prepare(batch)).observed
        with frozen(model):
            starts = 1 if state else number_of_starts(model, guide, inference)
            inference = replace(inference, starts=1)
            first = initial_state(model, guide, batch, inference, state, keys)
            fits = [fit_from(model, guide, batch, inference, first, rates)]
            if starts == 1:
                return fits[0]
            for start in range(1, starts):
                own = keys and keys.fold_in("start", start)
                pool = [at_a_draw(model, guide, batch, inference, own and own.fold_in(draw)) for draw in range(POOL)]
                first = select_states(pool, best_state_B(model, guide, batch, inference, pool))
                fits.append(fit_from(model, guide, batch, inference, first, rates))
            states = [state._replace(keys=keys) for state, _ in fits]
            best_B = best_state_B(model, guide, batch, inference, states, SCORING)
    columns = map(torch.stack, zip(*(info for _, info in fits), strict=True))
    info = LocalInfo(*(column.gather(0, best_B.expand_as(column[:1]))[0] for column in columns))
    return select_states(states, best_B), info


def fit_from(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, first: LocalState, rates: Rates | None
) -> tuple[LocalState, LocalInfo]:
    """One fit from a given state: the fast steps, and `Guide.finalize`."""
    state, terms = driver(inference)(model, guide, batch, inference, first, rates)
    state = finalize(model, guide, batch, inference, state)
    state = state._replace(parameters={name: x.detach() for name, x in state.parameters.items()})
    return state, LocalInfo(*terms, state.steps_B - first.steps_B)


class TrainingLoss(NamedTuple):
    """What the slow step needs: the loss, the fit, and the ELBO's terms at the last q that the loss includes."""

    loss: Float[Tensor, ""]
    state: LocalState
    info: LocalInfo
    terms: ElboTerms

    @property
    def is_finite_B(self) -> Bool[Tensor, " B"]:
        """Whether all ELBOs of a sequence are finite."""
        return self.info.is_finite_B & self.terms.elbo_B.isfinite()


def training_loss(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None = None,
    rates: Rates | None = None,
) -> TrainingLoss:
    """Runs the fast loop, and returns the loss −Σ ELBO (nats) whose ``backward`` gives the slow step's gradient.

    With ``slow_gradient="last"`` it is the loss at the final q, with ``"trajectory"`` the average over the q's before
    each fast step (but see `LocalInference.from_start` if there is only one). Without fast steps, or without local
    parameters (K = 0), both are the loss at the final q.
    """
    if inference.cuda_graph and inference.slow_gradient == "trajectory":
        raise UsageError("A CUDA graph cannot capture the slow gradient of a trajectory: set slow_gradient to last.")
    if batch.observed_BT is not None and inference.slow_gradient == "trajectory":
        raise UsageError(
            "Where q sees other tokens than are scored, the fast steps' loss is not the slow step's: set "
            "slow_gradient to last."
        )
    inference = inference.from_start() if state is None else inference
    with no_param_store(model):
        batch = model.prepare(batch)
        stem_BTD = None if batch.stem_BTD is None else batch.stem_BTD.detach()
        fast_batch = batch.observed._replace(stem_BTD=stem_BTD)  # no backward pass through the stem in the fast steps
        averaged = inference.slow_gradient == "trajectory"
        trajectory = TrajectoryGradient(model, guide, stem_BTD, batch.stem_BTD) if averaged else None
        with nullcontext() if trajectory else frozen(model):
            first = initial_state(model, guide, fast_batch, inference, state)
            state, fast_terms = driver(inference)(model, guide, fast_batch, inference, first, rates, trajectory)
            state = finalize(model, guide, fast_batch, inference, state)
        info = LocalInfo(*fast_terms, state.steps_B - first.steps_B)
        if trajectory and len(info.kl_NB):
            value = inference.loss(fast_terms) / len(info.kl_NB)
            return TrainingLoss(trajectory.loss(value), state, info, ElboTerms(*(x[-1] for x in fast_terms)))
        terms = elbo_terms(model, guide, batch, state.parameters, inference.draws).mean()
        return TrainingLoss(inference.loss(terms), state, info, terms.detach())


def init(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, keys: RowKeys | None = None
) -> LocalState:
    """The state before the first fast step: every sequence's q, initialised by ``inference.init``.

    With several ``inference.starts`` it is the one of them with the highest ELBO at one draw.
    """
    states = [init_at(model, guide, batch, inference, None, keys)]
    if guide.uses_fast_steps and inference.use_thoughts and states[0].has_parameters:
        starts = range(1, inference.starts or 1)
        states += [at_a_draw(model, guide, batch, inference, keys and keys.fold_in("start", x)) for x in starts]
    return select_states(states, best_state_B(model, guide, batch, inference, states)) if states[1:] else states[0]


def at_a_draw(model: Model, guide: Guide, batch: Batch, inference: LocalInference, keys: RowKeys | None) -> LocalState:
    """A state before the first fast step, with every sequence's q at a draw from the prior (`sites_at_a_draw`)."""
    return init_at(model, guide, batch, inference, sites_at_a_draw(model, batch, keys), keys)


def best_state_B(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, states: list[LocalState], draws: int = 1
) -> Int[Tensor, " B"]:
    """Which of several states has the highest ELBO, by sequence, at draws that no fit has used."""
    elbo_NB = torch.zeros(len(states), batch.size, dtype=torch.float64, device=batch.inputs_BT.device)
    for elbo_B, state in zip(elbo_NB, states, strict=True):
        for draw in range(draws):
            noise = state.keys and RowNoise(state.keys.fold_in("best start"), draw)
            with torch.no_grad():
                terms = elbo_terms(model, guide, batch, state.parameters, Draws(kl=inference.kl, noise=noise))
            elbo_B += terms.log_likelihood_B - inference.kl_weight * terms.kl_B
    return elbo_NB.nan_to_num(-torch.inf).argmax(0)


def select_states(states: list[LocalState], index_B: Int[Tensor, " B"]) -> LocalState:
    """Of each sequence its part of the state with the given number."""

    def chosen(parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts)
        return stacked.gather(0, index_B.view(1, -1, *[1] * (stacked.dim() - 2)).expand_as(stacked[:1]))[0]

    first = states[0]
    return first._replace(
        parameters={name: chosen([state.parameters[name] for state in states]) for name in first.parameters},
        moments={
            name: {key: chosen([state.moments[name][key] for state in states]) for key in found}
            for name, found in first.moments.items()
        },
        steps_B=chosen([state.steps_B for state in states]),
    )


def number_of_starts(model: Model, guide: Guide, inference: LocalInference) -> int:
    """``inference.starts``; by default 1, or `SEVERAL` under a prior that may have several modes.

    1 as well where no fast steps follow a start, and for the published code's reused noise.
    """
    if inference.starts == 1 or inference.noise == "reused":
        return 1
    if not (guide.uses_fast_steps and inference.steps and inference.use_thoughts):
        return 1
    with seeded(0):  # the caller's random numbers stay what they are
        sites = prior_sites(model, 1)
    if not any(fn.event_shape.numel() for fn in sites.values()):  # no thoughts
        return 1
    return inference.starts or (SEVERAL if has_several_modes(sites) else 1)


def passes_of_fit(model: Model, guide: Guide, inference: LocalInference) -> int:
    """The passes of a sequence through the decoder, forward or back, that `infer_local` takes, if none stops early."""
    gradients = inference.steps * inference.particles if guide.uses_fast_steps else 0
    gradients += guide.finalize_cost(inference.steps) if inference.steps else 0
    starts = number_of_starts(model, guide, inference)
    choice = starts * SCORING + (starts - 1) * POOL if starts > 1 else 0
    return 2 * gradients * starts + choice


def init_at(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, sites: Sites | None, keys: RowKeys | None
) -> LocalState:
    """The state before the first fast step, with q at the moments of the given distributions, else of the prior's."""
    with no_param_store(model), fix_draws_by_keys(model, keys), keyed(keys, "init"):
        parameters: Any = guide.init(sites or prior_sites(model, *prior_arguments(model, batch)), inference.init)
    if not isinstance(parameters, dict) or not all(isinstance(x, Tensor) for x in parameters.values()):
        given = type(parameters).__name__
        if isinstance(parameters, dict):
            given = f"a dictionary with {', '.join(sorted({type(x).__name__ for x in parameters.values()}))}"
        raise UsageError(
            f"{type(guide).__name__}.init returns {given}: return the local parameters as a dictionary from names to "
            f"tensors, such as {{'z_loc': …}}."
        )
    if wrong_shapes := {name: tuple(x.shape) for name, x in parameters.items() if x.shape[:1] != (batch.size,)}:
        raise UsageError(
            f"{type(guide).__name__}.init gives {wrong_shapes}: the first axis of every local parameter has to be the "
            f"{batch.size} sequences of the batch."
        )
    parameters = {name: x.detach() for name, x in parameters.items()}
    steps_B = torch.zeros(batch.size, dtype=torch.long, device=batch.inputs_BT.device)
    return LocalState(parameters, OPTIMIZERS[inference.optimizer].init(parameters), steps_B, keys=keys)


def step(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState,
    update: Update,
    trajectory: TrajectoryGradient | None = None,
) -> tuple[LocalState, ElboTerms]:
    r"""One fast step: draws z from every sequence's q, and updates q by the gradient of its ELBO.

    .. math:: z_i \sim q_{\phi_i}(z \mid x_i), \qquad
        \phi_i \leftarrow \phi_i + \eta_\mathrm{fast} \, \mathrm{Adam}(\nabla_{\phi_i} \mathrm{ELBO}_i), \quad
        \phi_i = (\mu_i, \sigma_i^2)

    It changes neither its arguments nor the global parameters; only ``trajectory`` accumulates.

    Args:
        update: the optimiser's update for this step, from `fast_updates`.
        trajectory: accumulates the global parameters' gradient at this q, if given.

    Returns:
        The next state, and the ELBO's terms at the q before the step (nats per sequence).
    """
    q = {name: x.detach().requires_grad_() for name, x in state.parameters.items()}
    global_tensors = trajectory.tensors if trajectory else []
    with torch.enable_grad(), nullcontext() if state.noise is None else seeded(state.noise):
        terms = elbo_terms(model, guide, batch, q, inference.draws_of_step(state)).mean()
        gradients = torch.autograd.grad(inference.loss(terms), [*q.values(), *global_tensors], allow_unused=True)
    if trajectory:
        trajectory.add(gradients[len(q) :])
    local_gradients = {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(q.items(), gradients[: len(q)], strict=True)
    }
    if inference.optimizer == "natural":
        local_gradients = guide.natural_gradient(state.parameters, local_gradients)
    return update(state, local_gradients), terms.detach()


def run_steps(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState,
    rates: Rates | None = None,
    trajectory: TrajectoryGradient | None = None,
    steps: range | None = None,
    rate: Rate | None = None,
) -> tuple[LocalState, ElboTerms]:
    """The plain driver: all fast steps, one after the other, without synchronising with the device.

    Args:
        steps: the fast steps to run, all of them by default.
        rate: η_fast instead of ``inference.rate``; a tensor if a CUDA graph reads it.

    Returns:
        The last state, and the ELBO's terms before each step, (N, B).
    """
    steps = range(number_of_fast_steps(guide, inference, state)) if steps is None else steps
    terms_of_steps = []
    for update in fast_updates(inference, state, steps, rates, rate):
        state, terms = step(model, guide, batch, inference, state, update, trajectory)
        terms_of_steps.append(terms)
    if not terms_of_steps:
        empty_NB = batch.mask_BT.new_zeros((0, batch.size), dtype=torch.get_default_dtype())
        return state, ElboTerms(empty_NB, empty_NB)
    return state.contiguous(), ElboTerms(*(torch.stack(x) for x in zip(*terms_of_steps, strict=True)))


def run_until_converged(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState,
    rates: Rates | None = None,
    trajectory: TrajectoryGradient | None = None,
) -> tuple[LocalState, ElboTerms]:
    """Per-sequence early stopping: after every ``stop.window`` steps, converged sequences are dropped from the batch.

    The ELBO's terms are nan for the steps that a sequence did not take.
    """
    if trajectory is not None:
        raise UsageError("The stopping rule needs the slow gradient of the last step: set slow_gradient to last.")
    stop, steps = inference.stop or Stop(), number_of_fast_steps(guide, inference, state)
    active_b = torch.arange(batch.size, device=batch.inputs_BT.device)
    previous_elbo_B = torch.full((batch.size,), -torch.inf, device=active_b.device)
    terms_2NB = torch.full((2, steps, batch.size), torch.nan, device=active_b.device)
    for first in range(0, steps, stop.window):
        window = range(first, min(first + stop.window, steps))
        active_state, active_batch = state.select(active_b), batch.select(active_b)
        active_state, terms = run_steps(model, guide, active_batch, inference, active_state, rates, steps=window)
        state = state.put(active_b, active_state)
        terms_2NB[:, first : window.stop, active_b] = torch.stack(terms).to(terms_2NB.dtype)
        elbo_b = terms.elbo_B.mean(0).to(previous_elbo_B.dtype)
        improving_b = ~(elbo_b - previous_elbo_B[active_b] < stop.tolerance)  # True if the ELBO is nan
        previous_elbo_B[active_b] = elbo_b
        active_b = active_b[improving_b]
        if not len(active_b):
            break
    return state, ElboTerms(*terms_2NB)


def run_cuda_graph(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState,
    rates: Rates | None = None,
    trajectory: TrajectoryGradient | None = None,
) -> tuple[LocalState, ElboTerms]:
    """`run_steps`, captured as a CUDA graph at the second batch of a shape and replayed for the batches after it."""

    def run(batch: Batch, state: LocalState, steps: range, rate: Tensor) -> tuple[LocalState, ElboTerms]:
        return run_steps(model, guide, batch, inference, state, rates, steps=steps, rate=rate)

    steps = range(number_of_fast_steps(guide, inference, state))
    if not steps:
        return run_steps(model, guide, batch, inference, state, rates)
    rate = torch.full((), inference.rate, device=batch.inputs_BT.device)  # a tensor may change without a new capture
    key = replace(inference, rate=1.0, init=Init()), repr([rates and rates(LOCAL + name) for name in state.parameters])
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    weights = [x for module in modules for x in (*module.parameters(), *module.buffers())] + global_draws(model)
    tensors = batch._replace(parts=None)  # a graph is captured per value of what is no tensor
    return graph_cache(guide, rate.device)(key, run, (tensors, state, steps, rate), weights)


Driver = Callable[..., tuple[LocalState, ElboTerms]]


def driver(inference: LocalInference) -> Driver:
    """The driver that the options choose: all steps, early stopping, or a CUDA graph."""
    return run_until_converged if inference.stop else run_cuda_graph if inference.cuda_graph else run_steps


def number_of_fast_steps(guide: Guide, inference: LocalInference, state: LocalState) -> int:
    """T_fast; 0 if the guide does not use fast steps, or has no local parameters (K = 0)."""
    return inference.steps if guide.uses_fast_steps and state.has_parameters else 0


def fast_updates(
    inference: LocalInference, state: LocalState, steps: range, rates: Rates | None = None, rate: Rate | None = None
) -> Iterator[Update]:
    """The optimiser's update for each of the given fast steps, with the learning rates of ``inference.schedule``.

    Args:
        rates: optimiser arguments by name of a local parameter, instead of ``inference.rate``.
        rate: η_fast instead of ``inference.rate``.
    """
    peak = 1.0 if rates else inference.rate if rate is None else rate
    factors, optimizer = [peak * inference.factor(index) for index in steps], OPTIMIZERS[inference.optimizer]
    if rates:
        optimizer.check(rates, state.parameters)
    return optimizer.updates(state, factors, rates or (lambda name: {"lr": 1.0}))


def finalize(model: Model, guide: Guide, batch: Batch, inference: LocalInference, state: LocalState) -> LocalState:
    """The state after `Guide.finalize`; unchanged if ``inference.steps`` is 0 or there are no local parameters."""
    if not inference.steps or not state.has_parameters:
        return state
    with frozen(model), keyed(state.keys and state.keys.fold_in(state.steps_B), "finalize"):
        parameters = guide.finalize(model, batch, state.parameters, inference.steps, inference.rate)
    return state._replace(parameters=parameters)


def initial_state(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    state: LocalState | None,
    keys: RowKeys | None = None,
) -> LocalState:
    """`init`, or the given state without what `finalize` added; raises `UsageError` if it does not fit."""
    if state is None:
        state = init(model, guide, batch, inference, keys)
    else:
        fast = {name: x for name, x in state.parameters.items() if name in state.moments}
        state = state._replace(parameters=fast, keys=keys)
        with seeded(0):
            one_sequence = guide.init(prior_sites(model, 1), Init())
        expected = {name: (batch.size, *x.shape[1:]) for name, x in one_sequence.items()}
        given = {name: tuple(x.shape) for name, x in state.parameters.items()}
        if expected != given:
            raise UsageError(
                f"The local state has parameters {given}, but this guide, model and batch need {expected}: "
                f"fit it anew, or select the batch's sequences from it."
            )
        if any(set(m) != set(OPTIMIZERS[inference.optimizer].moments) for m in state.moments.values()):
            raise UsageError(
                f"The local state comes from another optimizer than {inference.optimizer}: "
                f"continue with the one it was fitted with, or fit anew."
            )
    if inference.noise != "reused" or keys:
        return state._replace(noise=None)
    return state if state.noise is not None else state._replace(noise=int(torch.randint(2**62, ())))


@contextmanager
def frozen(model: Model | nn.Module) -> Iterator[None]:
    """Inside, ``requires_grad`` is False for the global parameters, so that no activations are kept for them.

    The model is in evaluation mode, because q is fitted to the decoder without dropout. Matrices are cast to autocast's
    type once, instead of at every product.
    """
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.train(False)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with cast_weights(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)
