"""Is this a model that can be trained? Asked before the first step; every answer names the site and the line.

Shapes: S particles, B sequences.
"""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from ltm_pyro.contracts import PARTICLES, SEQUENCES, Batch, Guide, Start, UsageError, make_batch, seeded
from ltm_pyro.elbo import elbo_terms, quiet
from ltm_pyro.inference import LocalInference
from ltm_pyro.local import begin, learn
from ltm_pyro.rates import slow_parameters
from ltm_pyro.shared import global_kl
from ltm_pyro.sites import bijections, prior_sites

SIZES = (5, 7)  # sequences: two numbers, so that no axis of a thought can pass for the plate of both


def check_prior(model: Any) -> None:
    """Refuses a prior whose sites or thoughts have not the shapes of `ltm_pyro.contracts.Prior`.

    Asked are: z's shape, every site inside the plate of sequences with one event per sequence, continuous, on a support
    that a guide can reach, and all of it with a leading axis of particles.
    """
    prior, shape = model.prior, model.decoder.thought_shape
    with seeded(0), torch.no_grad(), quiet():
        for size in SIZES:
            with _blame(prior):
                trace = poutine.trace(model.think).get_trace(size)
            _check_sites(trace, prior, size)
            _check_thoughts(trace, prior, (size, *shape))
        with _blame(prior):
            bijections(prior_sites(model, 1))
        with _blame(prior), pyro.plate(PARTICLES, 2, dim=-2):
            trace = poutine.trace(model.think).get_trace(size)
        _check_thoughts(trace, prior, (2, size, *shape))


def check_model(model: Any, guide: Guide) -> None:
    """Refuses a model and guide that cannot learn from two short texts: a term not finite, a parameter left out."""
    batch = _texts(model.decoder)
    with seeded(0):
        with torch.no_grad(), _blame(model.prior):
            local = begin(model, guide, batch, LocalInference()).parameters
            terms = elbo_terms(model, guide, batch, local)
        for name, value in terms._asdict().items():
            if not value.isfinite().all():
                raise UsageError(
                    f"{name.removesuffix('_B')} is {value.tolist()} before the first step: see the scales that "
                    f"{_line(model.prior, 'pyro.sample')} starts with."
                )
        _check_gradients(model, guide, batch)


def _texts(decoder: Any) -> Batch:
    length = min(8, decoder.length)
    tokens_BT = torch.arange(2 * length).reshape(2, length) % decoder.vocabulary
    return make_batch(tokens_BT, torch.full((2,), length), start_token=0)


def _check_sites(trace: Any, prior: Any, size: int) -> None:
    sites = [
        (n, x) for n, x in trace.nodes.items() if x["type"] == "sample" and not x["is_observed"] and n != SEQUENCES
    ]
    for name, node in sites:
        place = _line(prior, f'"{name}"', "pyro.sample")
        if site_is_subsample(node):
            raise UsageError(
                f"The prior opens a plate '{name}' ({place}), but the model has opened the plate of sequences around "
                f"it: leave it out, and let .to_event say which axes belong to one sequence."
            )
        if SEQUENCES not in {frame.name for frame in node["cond_indep_stack"]}:
            raise UsageError(
                f"Site '{name}' ({place}) lies outside the plate of sequences, where no guide goes: sample it in the "
                f"prior's forward, or make it an ltm_pyro.Shared variable."
            )
        if tuple(node["fn"].batch_shape) != (size,):
            raise UsageError(
                f"Site '{name}' ({place}) has batch shape {tuple(node['fn'].batch_shape)} for {size} sequences: add "
                f".to_event({len(node['fn'].batch_shape)}) to its distribution, so that a sequence has one event."
            )


def _check_thoughts(trace: Any, prior: Any, expected: tuple[int, ...]) -> None:
    z = trace.nodes["_RETURN"]["value"]
    found = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
    if found != expected:
        lead = "S, B" if len(expected) == 5 else "B"
        raise UsageError(
            f"{type(prior).__name__} returns {found} ({_line(prior, 'return')}) where ({lead}, L, K, D) = {expected} "
            f"is needed: let only the last three axes be fixed."
        )


def _check_gradients(model: Any, guide: Guide, batch: Batch) -> None:
    inference = LocalInference(steps=1, slow_gradient="last", start=Start(log_var=-1.0, jitter=0.1))
    loss = learn(model, guide, batch, inference).loss + global_kl(model)
    learned = [(name, p) for name, p in slow_parameters(model, guide) if p.requires_grad and p.numel()]
    gradients = torch.autograd.grad(loss, [p for _, p in learned], allow_unused=True)
    for (name, _), gradient in zip(learned, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all():
            problem = "is not finite at" if gradient is not None else "does not reach"
            owner = guide if name.startswith("guide.") else getattr(model, name.split(".")[0])
            raise UsageError(
                f"The gradient {problem} the parameter '{name}' ({_line(owner)}): use it in the density, register it "
                f"as a buffer, or remove it."
            )


@contextmanager
def _blame(prior: Any) -> Iterator[None]:
    """What goes wrong inside is the prior's; the sentence names the last of its own lines that was reached."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error} See {_line(prior, 'pyro.sample')}.") from None
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _file(prior)]
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else _line(prior)
        advice = ": add .to_event(3), so that a sequence has one event" if "inside plate" in _first(error) else ""
        raise UsageError(
            f"{type(prior).__name__} fails at {place}: {type(error).__name__}, {_first(error)}{advice}"
        ) from error


def _file(part: Any) -> str | None:
    try:
        return inspect.getsourcefile(type(part))
    except (OSError, TypeError):  # written at a prompt
        return None


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no more is known"])[0]


def _line(part: Any, *words: str) -> str:
    """``file:line`` of the forward (or class), at the first line that holds one of the ``words``, tried in turn."""
    code = getattr(type(part), "forward", None) or type(part)
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError):  # written at a prompt
        return type(part).__name__
    found = [index for word in words for index, line in enumerate(lines) if word in line]
    return f"{inspect.getsourcefile(code)}:{first + (found or [0])[0]}"
