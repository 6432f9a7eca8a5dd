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
from ltm_pyro.inference.enumeration import enumerated_sites, values_of
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import bijections, check_density, is_local, prior_factors, prior_sites
from ltm_pyro.inference.param_store import adopt_params, no_param_store, param_statements
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.threads import one_at_a_time

ADVICE = {  # a word of Pyro's complaint: the way out
    "inside plate": ": add .to_event(3), so that each sequence has one event",
    "collide at dim": ": leave the plate out, and declare what belongs to one sequence by .to_event",
}
CALLS = 8  # of the prior, in which its sites have to be the same
BATCH_SIZES = (5, 7)  # two sizes, so that an axis of fixed length cannot be mistaken for the plate of sequences


@one_at_a_time
def check_prior(model: Any, adopt: bool = False) -> None:
    """Raises `UsageError` if a prior does not meet the contract `ltm_pyro.contracts.Prior`.

    It checks the shape of z, and that every site is inside the plate of sequences, has one event per sequence, is
    continuous and has a support that can be mapped to the reals. It also checks z with a leading axis of particles, and
    that p(z) is a density: not scaled, masked or observed, and without a `pyro.factor` that depends on what is learned;
    that the sites are the same in every call, z a function of them alone, and sequences independent of each other.

    Args:
        adopt: for a model that can: makes every `pyro.param` of the prior a parameter of the prior (`adopt_params`),
            and sums its enumerated sites out (`ltm_pyro.inference.enumeration`); else both are refused.
    """
    prior, shape = model.prior, model.decoder.thought_shape
    _check_modules(prior)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), no_param_store(model), explain_failure(prior):
        nodes = poutine.trace(model.sample_prior).get_trace(1).nodes
        if adopt:
            adopt_params(prior, nodes)
            if discrete := enumerated_sites(nodes):
                check_density(nodes)  # of the program, whose sites are no longer seen one by one
                model.enumerated = values_of(discrete)
        elif params := param_statements(nodes):
            raise UsageError(
                f"The prior's pyro.param '{next(iter(params))}' would not be learned in {type(model).__name__}: write "
                f"self.name = pyro.nn.PyroParam(…) in the prior's __init__, and use that in forward."
            )
    with seeded(0), torch.no_grad(), no_param_store(model):
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
        with explain_failure(prior):
            _check_rows(model)
        with torch.enable_grad():
            learned = [name for name, x in prior_factors(model).items() if x.requires_grad]
    if learned:
        raise UsageError(
            f"The factor '{learned[0]}' ({source_line(prior, 'pyro.factor')}) depends on what is learned, and so does "
            f"the constant of the prior, whose gradient training leaves out: fix the parameters, or use EnergyPrior."
        )


def _check_rows(model: Any) -> None:
    """Refuses a prior whose sites change from call to call, that draws beside them, or that couples sequences."""
    size, prior = BATCH_SIZES[0], model.prior
    training = isinstance(prior, torch.nn.Module) and prior.training
    if training:
        prior.eval()  # as in local inference, without dropout
    try:
        with fix_global_draws(model, 0):
            drawn = [poutine.trace(model.sample_prior).get_trace(size) for _ in range(CALLS)]
            names = [{name for name, node in trace.nodes.items() if is_local(node)} for trace in drawn]
            if sometimes := sorted(set.union(*names) - set.intersection(*names)):
                source = source_line(prior, f'"{sometimes[0]}"', "pyro.sample")
                raise UsageError(
                    f"Site '{sometimes[0]}' ({source}) is sampled in some calls and not in others: sample it always, "
                    f"and let what follows use it or not."
                )
            one, other = ({name: trace.nodes[name]["value"] for name in names[0]} for trace in drawn[:2])
            # the first row is the same
            mixed = {name: torch.cat([one[name][:1], other[name][1:]]) for name in names[0]}
            given = [poutine.condition(model.sample_prior, x) for x in (one, one, mixed)]
            found: list[Any] = [poutine.trace(sample).get_trace(size) for sample in given]
    finally:
        if training:
            prior.train()
    first, again, changed = (
        [x.nodes["_RETURN"]["value"], *(x.nodes[n]["fn"].log_prob(one[n]) for n in one)] for x in found
    )
    if not all(map(_equal, first, again)):
        raise UsageError(
            f"{type(prior).__name__} draws random numbers beside its sites ({source_line(prior, 'torch.rand')}), of "
            f"which p(z) has no density: make them a site with pyro.sample."
        )
    if not all(_equal(x[:1], y[:1]) for x, y in zip(first, changed, strict=True)):
        raise UsageError(
            f"{type(prior).__name__} couples sequences ({source_line(prior, 'return')}): the first one's thoughts or "
            f"density change with those of others in the batch. Let every operation keep the sequences apart."
        )


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)


def _check_modules(prior: Any) -> None:
    """Refuses `PyroSample` attributes, which would be drawn anew for every sequence."""
    for part in prior.modules() if isinstance(prior, torch.nn.Module) else ():
        for name in getattr(part, "_pyro_samples", {}):
            raise UsageError(
                f"{type(part).__name__}.{name} ({source_line(part)}) is a PyroSample, of which every sequence would "
                f"get a draw of its own: for one variable of the whole corpus use ltm_pyro.GlobalLatent, for one of "
                f"each sequence pyro.sample in forward."
            )


def _check_sites(trace: Any, prior: Any, size: int) -> None:
    sites = [
        (n, x) for n, x in trace.nodes.items() if x["type"] == "sample" and not x["is_observed"] and n != SEQUENCES
    ]
    for name, node in sites:
        source = source_line(prior, f'"{name}"', "pyro.sample")
        if wrong := {".", "/"} & set(name):
            raise UsageError(
                f"Site '{name}' ({source}) has '{min(wrong)}' in its name, which separates names in posteriors' "
                f"files and in modules: write '{name.replace('.', '_').replace('/', '_')}'."
            )
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
def explain_failure(part: Any, other: Any = None) -> Iterator[None]:
    """Turns an exception of a prior or guide into a `UsageError` that names the last line of its own source file.

    Args:
        part: the prior or the guide that is asked.
        other: the other one, whose failure it is if it was the last of the two to be called.
    """
    try:
        yield
    except UsageError as error:
        message, _, _ = str(error).partition("\nTrace Shapes:")  # which Pyro adds to what is raised in a trace
        if isinstance(part, Guide) or "rior site" not in message:  # it names what it is about
            raise UsageError(message.strip()) from None
        raise UsageError(f"{message} See {source_line(part, 'pyro.sample')}.") from None
    except Exception as error:
        called = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        part = next((x for x in reversed(called) if x is not None and (x is part or x is other)), part)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _source_file(part)]
        source = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else source_line(part)
        reason = (str(error).strip().splitlines() or ["without a message"])[0]
        advice = next((text for word, text in ADVICE.items() if word in reason), "")
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
