"""A user's own priors and guides: given by dotted path or by file, and written into the run's recipe by file."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from site import getsitepackages
from sysconfig import get_paths
from typing import Any

import yaml

from ltm_pyro.errors import UsageError

IN_FILE = re.compile(r"(?P<file>[^:]+\.py):(?P<name>\w+)")  # some/folder/my_prior.py:SpikeAndSlab
INSTALLED = [Path(x).resolve() for x in (*getsitepackages(), get_paths()["stdlib"])]  # modules that a name finds again


def resolve(value: Any) -> Any:
    """A recipe in which every ``file.py:Name`` is imported and replaced by ``file.Name``."""
    if isinstance(value, dict):
        return {key: resolve(x) for key, x in value.items()}
    if isinstance(value, list):
        return [resolve(x) for x in value]
    found = IN_FILE.fullmatch(value) if isinstance(value, str) else None
    return f"{import_file(Path(found['file']))}.{found['name']}" if found else value


def resolve_argument(argument: str) -> str:
    """The same for one argument of the command line, ``--key=value`` included."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{resolve(value)}"


def load(text: str) -> Any:
    """YAML in which every ``file.py:Name`` is imported."""
    return resolve(yaml.safe_load(text))


def import_file(path: Path) -> str:
    """Imports a file and returns its module's name; a missing file is looked for in the current folder."""
    file = path if path.is_file() else Path.cwd() / path.name
    if not file.is_file():
        raise UsageError(f"The file {path} is missing: put it back, or copy {path.name} to the current folder.")
    name, file = file.stem, file.resolve()
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) != str(file):
            raise UsageError(f"There is another module '{name}' than {file}: rename the file.")
        return name
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{file} cannot be imported ({type(error).__name__}: {error}): fix it.") from error
    return name


def name_files(recipe: str) -> str:
    """A recipe's text in which classes of the user's own top-level modules are named by file."""
    return re.sub(r"(?<=class_path: )(\w+)\.(\w+)$", _by_file, recipe, flags=re.MULTILINE)


def _by_file(found: re.Match[str]) -> str:
    file = getattr(sys.modules.get(found[1]), "__file__", None)
    if file is None or any(Path(file).resolve().is_relative_to(place) for place in INSTALLED):
        return found[0]
    return f"{Path(file).resolve()}:{found[2]}"
