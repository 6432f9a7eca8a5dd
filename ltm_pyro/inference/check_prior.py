"""Checks that a prior can be trained, before the first step; every error names the site and the source line.

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

from ltm_pyro.contracts import PARTICLES, SEQUENCES
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import no_param_store
from ltm_pyro.inference.latent_sites import bijections, prior_sites
from ltm_pyro.utils.rng import seeded

SIZES = (5, 7)  # sequences: two numbers, so that no axis of a thought can pass for the plate of both


def check_prior(model: Any) -> None:
    """Refuses a prior whose sites or thoughts have not the shapes of `ltm_pyro.contracts.Prior`.

    Asked are: z's shape, every site inside the plate of sequences with one event per sequence, continuous, on a support
    that a guide can reach, and all of it with a leading axis of particles.
    """
    prior, shape = model.prior, model.decoder.thought_shape
    with seeded(0), torch.no_grad(), no_param_store():
        for size in SIZES:
            with explain_failure(prior):
                trace = poutine.trace(model.sample_prior).get_trace(size)
            _check_sites(trace, prior, size)
            _check_thoughts(trace, prior, (size, *shape))
        with explain_failure(prior):
            bijections(prior_sites(model, 1))
        with explain_failure(prior), pyro.plate(PARTICLES, 2, dim=-2):
            trace = poutine.trace(model.sample_prior).get_trace(size)
        _check_thoughts(trace, prior, (2, size, *shape))


def _check_sites(trace: Any, prior: Any, size: int) -> None:
    sites = [
        (n, x) for n, x in trace.nodes.items() if x["type"] == "sample" and not x["is_observed"] and n != SEQUENCES
    ]
    for name, node in sites:
        place = source_line(prior, f'"{name}"', "pyro.sample")
        if site_is_subsample(node):
            raise UsageError(
                f"The prior opens a plate '{name}' ({place}), but the model has opened the plate of sequences around "
                f"it: leave it out, and let .to_event say which axes belong to one sequence."
            )
        if SEQUENCES not in {frame.name for frame in node["cond_indep_stack"]}:
            raise UsageError(
                f"Site '{name}' ({place}) lies outside the plate of sequences, where no guide goes: sample it in the "
                f"prior's forward, or make it an ltm_pyro.GlobalLatent variable."
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
            f"{type(prior).__name__} returns {found} ({source_line(prior, 'return')}) where ({lead}, L, K, D) = "
            f"{expected} is needed: let only the last three axes be fixed."
        )


@contextmanager
def explain_failure(prior: Any) -> Iterator[None]:
    """What goes wrong inside is the prior's; the sentence names the last of its own lines that was reached."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error} See {source_line(prior, 'pyro.sample')}.") from None
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _file(prior)]
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else source_line(prior)
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


def source_line(part: Any, *words: str) -> str:
    """``file:line`` of the forward (or class), at the first line that holds one of the ``words``, tried in turn."""
    code = getattr(type(part), "forward", None) or type(part)
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError):  # written at a prompt
        return type(part).__name__
    found = [index for word in words for index, line in enumerate(lines) if word in line]
    return f"{inspect.getsourcefile(code)}:{first + (found or [0])[0]}"
