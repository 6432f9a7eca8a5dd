"""Pyro's global store of parameters is kept out of inference; what a prior asks of it becomes the prior's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.threads import one_at_a_time

_model_without_store: ContextVar[object] = ContextVar("model_without_store", default=None)


@contextmanager
def no_param_store(model: object = None) -> Iterator[None]:
    """Inside, no parameter stays in Pyro's global store, and no argument is validated. Other threads wait.

    Validation synchronises with the device at every site, and lets one sequence's non-finite parameters stop all the
    others.

    Args:
        model: inside another `no_param_store` of the same model this one does nothing, because Pyro registers every
            parameter anew in a new scope; another model must not find parameters of the same name. What the model has
            frozen stays frozen.
    """
    if model is not None and _model_without_store.get() is model:
        yield
        return
    token = _model_without_store.set(model)
    try:
        with one_at_a_time, pyro.get_param_store().scope(_frozen(model)), pyro.validation_enabled(False):
            yield
    finally:
        _model_without_store.reset(token)


def _frozen(model: object) -> Any:
    """The content of a store that knows a model's parameters with ``requires_grad=False``.

    Pyro sets ``requires_grad`` of every parameter that enters its store by `pyro.param`; of one that is there, it does
    not.
    """
    named = model.named_parameters() if isinstance(model, PyroModule) else ()
    root = model._pyro_name if isinstance(model, PyroModule) else ""
    frozen = {f"{root}.{name}" if root else name: x for name, x in named if not x.requires_grad}
    return {"params": frozen, "constraints": dict.fromkeys(frozen, constraints.real)}


def adopt_params(prior: Any, nodes: dict[str, Any]) -> None:
    """Makes every `pyro.param` of a prior a parameter of the prior: learned, saved and loaded as its others are.

    Args:
        prior: a `PyroModule`, which gets a `PyroParam` by the statement's name.
        nodes: of a trace of the prior.
    """
    for name, node in param_statements(nodes).items():
        if not isinstance(prior, PyroModule) or not name.isidentifier() or hasattr(prior, name):
            raise UsageError(
                f"The prior's pyro.param '{name}' cannot be learned: only a PyroModule keeps it, under a name that is "
                f"an identifier and not yet one of its attributes. Rename it, or write self.{_identifier(name)} = "
                f"pyro.nn.PyroParam(…) in __init__ and use that in forward."
            )
        constraint, event_dim = node["kwargs"]["constraint"], node["kwargs"]["event_dim"]
        setattr(prior, name, PyroParam(node["value"].detach().clone(), constraint, event_dim))
        prior.adopted_params = (*getattr(prior, "adopted_params", ()), name)


def _identifier(name: str) -> str:
    return "".join(x if x.isalnum() else "_" for x in name)


def param_statements(nodes: dict[str, Any]) -> dict[str, Any]:
    """The `pyro.param` statements of a trace by name, without the parameters of modules, which are there as well."""

    def is_of_module(value: Any) -> bool:
        return isinstance(value, nn.Parameter) or isinstance(getattr(value, "unconstrained", list)(), nn.Parameter)

    params = {name: node for name, node in nodes.items() if node["type"] == "param"}
    return {name: node for name, node in params.items() if not is_of_module(node["value"])}


class OwnParams(Messenger):
    """A Pyro handler around a prior: it keeps its parameters, those of `pyro.param` too, out of Pyro's store.

    A `pyro.param` statement gets the parameter that the prior has adopted, which other handlers see under the module's
    name. A frozen parameter is given to no handler and no store, which would set its ``requires_grad``.
    """

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior, self.adopted = prior, getattr(prior, "adopted_params", ())

    def _pyro_param(self, msg: Any) -> None:
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        if msg["name"] in self.adopted:
            msg["value"] = getattr(self.prior, msg["name"])
        elif isinstance(init, nn.Parameter) and not init.requires_grad:
            msg["value"] = init
        else:
            return
        msg["done"] = msg["stop"] = True
