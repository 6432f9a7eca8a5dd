"""Pyro's global store of parameters is kept out of inference."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pyro

from ltm_pyro.utils.threads import one_at_a_time

_model_without_store: ContextVar[object] = ContextVar("model_without_store", default=None)


@contextmanager
def no_param_store(model: object = None) -> Iterator[None]:
    """Inside, no parameter stays in Pyro's global store, and no argument is validated. Other threads wait.

    Validation synchronises with the device at every site, and lets one sequence's non-finite parameters stop all the
    others.

    Args:
        model: inside another `no_param_store` of the same model this one does nothing, because Pyro registers every
            parameter anew in a new scope; another model must not find parameters of the same name.
    """
    if model is not None and _model_without_store.get() is model:
        yield
        return
    token = _model_without_store.set(model)
    try:
        with one_at_a_time, pyro.get_param_store().scope(), pyro.validation_enabled(False):
            yield
    finally:
        _model_without_store.reset(token)
