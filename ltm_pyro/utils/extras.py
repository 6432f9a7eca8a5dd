"""Optional dependencies, imported when they are needed."""

from importlib import import_module
from typing import Any

from ltm_pyro.errors import UsageError


def extra(module: str, name: str, wanted_by: str) -> Any:
    """The module; if its package is missing, `UsageError` names the extra of ltm-pyro that installs it."""
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(f"{wanted_by} needs {package}: pip install 'ltm-pyro[{name}]'.") from None
