"""Checks a prior before training; every error names the site and the source line.

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

from ltm_pyro.contracts import PARTICLES, SEQUENCES, Guide
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.latent_sites import bijections, prior_factors, prior_sites
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.utils.rng import seeded

BATCH_SIZES = (5, 7)  # two sizes, so that an axis of fixed length cannot be mistaken for the plate of sequences


def check_prior(model: Any) -> None:
    """Raises `UsageError` if a prior does not meet the contract `ltm_pyro.contracts.Prior`.

    It checks the shape of z, and that every site is inside the plate of sequences, has one event per sequence, is
    continuous and has a support that can be mapped to the reals. It also checks z with a leading axis of particles, and
    that p(z) is a density: not scaled, masked or observed, and without a `pyro.factor` that depends on what is learned.
    """
    prior, shape = model.prior, model.decoder.thought_shape
    with seeded(0), torch.no_grad(), no_param_store():
        for size in BATCH_SIZES:
            with explain_failure(prior):
                trace = poutine.trace(model.sample_prior).get_trace(size)
            _check_sites(trace, prior, size)
            _check_thoughts(trace, prior, (size, *shape))
        with explain_failure(prior):
            bijections(prior_sites(model, 1))
        with explain_failure(prior), pyro.plate(PARTICLES, 2, dim=-2):
            trace = poutine.trace(model.sample_prior).get_trace(size)
        _check_thoughts(trace, prior, (2, size, *shape))
        with torch.enable_grad():
            learned = [name for name, x in prior_factors(model).items() if x.requires_grad]
    if learned:
        raise UsageError(
            f"The factor '{learned[0]}' ({source_line(prior, 'pyro.factor')}) depends on what is learned, and so does "
            f"the constant of the prior, whose gradient training leaves out: fix the parameters, or use EnergyPrior."
        )


def _check_sites(trace: Any, prior: Any, size: int) -> None:
    sites = [
        (n, x) for n, x in trace.nodes.items() if x["type"] == "sample" and not x["is_observed"] and n != SEQUENCES
    ]
    for name, node in sites:
        source = source_line(prior, f'"{name}"', "pyro.sample")
        if site_is_subsample(node):
            raise UsageError(
                f"The prior opens a plate '{name}' ({source}), but the model already opens that of sequences: "
                f"leave it out, and use .to_event to declare which axes belong to one sequence."
            )
        if SEQUENCES not in {frame.name for frame in node["cond_indep_stack"]}:
            raise UsageError(
                f"Site '{name}' ({source}) is outside the plate of sequences, so no guide has it: sample it in the "
                f"prior's forward, or make it an ltm_pyro.GlobalLatent variable."
            )
        if tuple(node["fn"].batch_shape) != (size,):
            raise UsageError(
                f"Site '{name}' ({source}) has batch shape {tuple(node['fn'].batch_shape)} for {size} sequences: add "
                f".to_event({len(node['fn'].batch_shape)}) to its distribution, so that each sequence has one event."
            )


def _check_thoughts(trace: Any, prior: Any, expected: tuple[int, ...]) -> None:
    z = trace.nodes["_RETURN"]["value"]
    returned = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
    if returned != expected:
        lead = "S, B" if len(expected) == 5 else "B"
        raise UsageError(
            f"{type(prior).__name__} returns {returned} ({source_line(prior, 'return')}) instead of ({lead}, L, K, D) "
            f"= {expected}: only its last three axes may have a fixed length."
        )


@contextmanager
def explain_failure(part: Any) -> Iterator[None]:
    """Turns an exception of a prior or guide into a `UsageError` that names the last line of its own source file."""
    try:
        yield
    except UsageError as error:
        if isinstance(part, Guide):  # what is refused in a guide is named by its class
            raise
        raise UsageError(f"{error} See {source_line(part, 'pyro.sample')}.") from None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _source_file(part)]
        source = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else source_line(part)
        reason = (str(error).strip().splitlines() or ["without a message"])[0]
        advice = ": add .to_event(3), so that each sequence has one event" if "inside plate" in reason else ""
        raise UsageError(
            f"{type(part).__name__} fails at {source}: {type(error).__name__}, {reason}{advice}"
        ) from error


def _source_file(part: Any) -> str | None:
    try:
        return inspect.getsourcefile(type(part))
    except (OSError, TypeError):  # defined interactively
        return None


def source_line(part: Any, *words: str) -> str:
    """``file:line`` in the part's forward, a guide's call, or its class: the first line with one of the ``words``."""
    code = type(part).__call__ if isinstance(part, Guide) else getattr(type(part), "forward", None) or type(part)
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError):  # defined interactively
        return type(part).__name__
    matches = [index for word in words for index, line in enumerate(lines) if word in line]
    return f"{inspect.getsourcefile(code)}:{first + (matches or [0])[0]}"
