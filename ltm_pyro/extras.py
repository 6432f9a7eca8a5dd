"""Packages that not everybody needs, imported when they are asked for."""

from importlib import import_module
from typing import Any

from ltm_pyro.contracts import UsageError


def extra(package: str, name: str, wanted_by: str) -> Any:
    """The package; `UsageError` says which extra of ltm-pyro brings it where it is missing."""
    try:
        return import_module(package)
    except ImportError:
        raise UsageError(f"{wanted_by} needs {package}: pip install 'ltm-pyro[{name}]'.") from None
