"""Checks before the first step that model and guide can be trained: finite terms, a gradient for every parameter."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine

from ltm_pyro.contracts import SEQUENCES, Batch, Guide, Init, LocalParameters, make_batch
from ltm_pyro.data.manifest import Label
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.check_prior import check_prior, explain_failure, source_line
from ltm_pyro.inference.elbo import elbo_terms, latent_sites
from ltm_pyro.inference.global_latents import global_kl
from ltm_pyro.inference.learning_rates import slow_parameters
from ltm_pyro.inference.local import init, training_loss
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.utils.rng import seeded


def check_model(model: Any, guide: Guide, leaves_out_thoughts: bool = False) -> None:
    """Raises `UsageError` for a bad prior or guide, no finite ELBO of two short texts, or a parameter without gradient.

    Args:
        leaves_out_thoughts: whether the model is to train without its thoughts in some stage; its forward has to take
            ``use_thoughts`` then.
    """
    forward = inspect.signature(model.forward).parameters.values()
    if leaves_out_thoughts and not any(x.name == "use_thoughts" or x.kind is x.VAR_KEYWORD for x in forward):
        raise UsageError(
            f"Without fast steps the decoder trains without thoughts, but {type(model).__name__}.forward "
            f"({source_line(model)}) takes no `use_thoughts`: add it, as in ltm_pyro.models.LatentThoughtModel, or "
            f"give every stage of the training fast steps."
        )
    check_prior(model)  # which `LatentThoughtModel` has done already, but not a user's own joint model
    decoder = model.decoder
    length = min(8, decoder.length)
    tokens_BT = torch.arange(2 * length).reshape(2, length) % decoder.vocabulary
    batch = make_batch(tokens_BT, torch.full((2,), length), start_token=0)
    with seeded(0):
        with torch.no_grad(), explain_failure(guide, model.prior):
            local = init(model, guide, batch, LocalInference()).parameters
            _check_plate(model, guide, batch, local)
        with torch.no_grad(), explain_failure(model.prior, guide):
            terms = elbo_terms(model, guide, batch, local)
        for name, value in terms._asdict().items():
            if not value.isfinite().all():
                raise UsageError(
                    f"{name.removesuffix('_B')} is {value.tolist()} before the first step: see the scales that "
                    f"{source_line(model.prior, 'pyro.sample')} starts with."
                )
        with explain_failure(model.prior, guide):
            _check_gradients(model, guide, batch)


def check_state(model: Any, build: Callable[[], Any]) -> None:
    """Refuses a prior that is more than its ``state_dict``, such as one with a tensor drawn in ``__init__``.

    It would be another one in every process that loads the run. A second one, built under other random numbers and with
    the first one's ``state_dict``, has to draw the same values with the same density.

    Args:
        build: builds the model anew.
    """
    with seeded(1):
        other = build()
    other.load_state_dict(model.state_dict())
    found = []
    for each in (model, other):
        with seeded(0), torch.no_grad(), no_param_store(each):
            trace = poutine.trace(each.sample_prior).get_trace(3)
            trace.compute_log_prob()
        sites = {name: x for name, x in trace.nodes.items() if x["type"] == "sample" and "log_prob" in x}
        found.append({name: (x["value"], x["log_prob"]) for name, x in sites.items()})
    for name, pair in found[0].items():
        if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(pair, found[1][name], strict=True)):
            source = source_line(model.prior, f'"{name}"', "pyro.sample")
            raise UsageError(
                f"Site '{name}' ({source}) is not determined by the "
                f"prior's state_dict, so that a loaded run would be another model: make what __init__ draws a "
                f"torch.nn.Parameter, or a buffer (self.register_buffer)."
            )


def check_labels(model: Any, labels: Mapping[str, Label], place: str) -> None:
    """Refuses a prior that asks for a label that the packed data do not have, or of which it knows no value."""
    covariates: Any = getattr(model, "covariates", None)
    for name in covariates.names if covariates else ():
        if name not in labels:
            has = f"the labels {', '.join(labels)}" if labels else "no labels"
            raise UsageError(
                f"{type(model.prior).__name__} asks for the label '{name}', but {place} has {has}: pack the data with "
                f"--label {name}."
            )
        levels, values = covariates.levels.get(name), labels[name].values
        if levels is not None and values and not {*levels} & {*values}:
            raise UsageError(
                f"{type(model.prior).__name__} knows the values {', '.join(map(str, levels))} of the label '{name}', "
                f"of which {place} has none: its values are {', '.join(map(str, values[:10]))}."
            )


def _check_plate(model: Any, guide: Guide, batch: Batch, local: LocalParameters) -> None:
    """Refuses a guide whose sites are outside the plate of sequences, or of another shape."""
    with no_param_store(model):
        sites = latent_sites(poutine.trace(guide).get_trace(batch, local))
    for name, site in sites.items():
        shape = tuple(site["fn"].batch_shape)
        if SEQUENCES not in {frame.name for frame in site["cond_indep_stack"]} or shape != (batch.size,):
            source = source_line(guide, f'"{name}"', "pyro.sample")
            raise UsageError(
                f"{type(guide).__name__} samples '{name}' ({source}) outside "
                f"the plate of sequences, or with batch shape {shape} for {batch.size} sequences: write "
                f"`with ltm_pyro.contracts.sequence_plate(batch.size):` around it, and .to_event for the axes of one "
                f"sequence."
            )


def _check_gradients(model: Any, guide: Guide, batch: Batch) -> None:
    inference = LocalInference(steps=1, slow_gradient="last", init=Init(log_var=-1.0, jitter=0.1))
    loss = training_loss(model, guide, batch, inference).loss + global_kl(model)
    learned = [(name, p) for name, p in slow_parameters(model, guide) if p.requires_grad and p.numel()]
    gradients = torch.autograd.grad(loss, [p for _, p in learned], allow_unused=True)
    for (name, _), gradient in zip(learned, gradients, strict=True):
        if gradient is None or not gradient.isfinite().all():
            problem = "is not finite at" if gradient is not None else "does not reach"
            owner = guide if name.startswith("guide.") else getattr(model, name.split(".")[0])
            raise UsageError(
                f"The gradient {problem} the parameter '{name}' ({source_line(owner)}): use it in the density, "
                f"register it as a buffer, or remove it."
            )
