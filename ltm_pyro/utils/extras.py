"""Packages that not everybody needs, imported when they are asked for."""

from importlib import import_module
from typing import Any

from ltm_pyro.errors import UsageError


def extra(module: str, name: str, wanted_by: str) -> Any:
    """The module; `UsageError` says which extra of ltm-pyro brings its package where that is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(f"{wanted_by} needs {package}: pip install 'ltm-pyro[{name}]'.") from None
