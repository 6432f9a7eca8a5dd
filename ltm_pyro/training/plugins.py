"""A user's own priors and guides: given by dotted path or by file, and written into the run's recipe by file.

Nothing here asks whether code is trusted: `ltm_pyro.training.trust` does, before a recipe of others comes here.
"""

import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from site import getsitepackages
from sysconfig import get_paths
from typing import Any

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.safe_yaml import load_yaml

IN_FILE = re.compile(r"(?P<file>[^:]+\.py):(?P<name>\w+)")  # some/folder/my_prior.py:SpikeAndSlab
INSTALLED = [Path(x).resolve() for x in (*getsitepackages(), get_paths()["stdlib"])]  # modules that a name finds again
PARTS = ("decoder", "prior", "joint", "guide")  # of a model: each is a class
OF_TRAINER = ("callbacks", "logger", "plugins", "profiler", "strategy")  # which may be classes
IMPORTING = {f"model.{name}" for name in PARTS} | {f"trainer.{name}" for name in OF_TRAINER}


def resolve(value: Any, key: str = "", known: Callable[[str], type | None] = lambda name: None) -> Any:
    """A recipe in which every ``file.py:Name`` that stands for a class is imported and replaced by ``file.Name``.

    A class is expected at a ``class_path``, and at the `IMPORTING` keys themselves. Elsewhere such a text stays as it
    is: a run or a folder may be called so.

    Args:
        key: the dotted key of ``value``.
        known: classes that are there already, by the name that a recipe has for them.
    """
    if isinstance(value, dict):
        return {name: resolve(x, f"{key}.{name}".removeprefix("."), known) for name, x in value.items()}
    if isinstance(value, list):
        return [resolve(x, key, known) for x in value]
    at_class = key.endswith("class_path") or key.rstrip("+") in IMPORTING
    if not isinstance(value, str) or not (at_class or ".init_args." in key):
        return value
    if at_class and (cls := known(value)):
        return f"{cls.__module__}.{cls.__qualname__}"
    if at_class and (found := IN_FILE.fullmatch(value)):
        return f"{import_file(Path(found['file']))}.{found['name']}"
    _add_current_folder(value)
    return value


def use_copies(value: Any, folder: Path) -> Any:
    """A recipe in which every ``file.py:Name`` whose file is missing names its copy in ``folder``, if that is there."""
    if isinstance(value, dict):
        return {key: use_copies(x, folder) for key, x in value.items()}
    if isinstance(value, list):
        return [use_copies(x, folder) for x in value]
    if not isinstance(value, str) or not (found := IN_FILE.fullmatch(value)):
        return value
    copy = folder / Path(found["file"]).name
    return f"{copy.resolve()}:{found['name']}" if copy.is_file() and not _place(Path(found["file"])) else value


def resolve_arguments(arguments: list[str]) -> list[str]:
    """The same for the words of the command line, ``--KEY VALUE`` or ``--KEY=VALUE``."""
    words, key = [], ""
    for word in arguments:
        name, equals, value = word.partition("=") if word.startswith("--") else (f"--{key}", "", word)
        key = name.removeprefix("--")
        value = resolve(value, key) if equals or not word.startswith("--") else value
        words.append(f"{name}{equals}{value}" if word.startswith("--") else value)
    return words


def locate(path: Path) -> Path:
    """The file that is imported for a recipe's ``path``; a missing one is looked for in the current folder."""
    if not (file := _place(path)):
        raise UsageError(f"The file {path} is missing: put it back, or copy {path.name} to the current folder.")
    return file.resolve()


def _place(path: Path) -> Path | None:
    return next((file for file in (path, Path.cwd() / path.name) if file.is_file()), None)


def import_file(path: Path) -> str:
    """Imports a file and returns its module's name; files beside it can be imported by it."""
    file = locate(path)
    name = file.stem
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) != str(file):
            raise UsageError(f"There is another module '{name}' than {file}: rename the file.")
        return name
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{file} cannot be imported ({type(error).__name__}: {error}): fix it.") from error
    return name


def module_file(dotted: str) -> Path | None:
    """The file of the module in a dotted path, found without importing anything; also in the current folder."""
    name, *below = dotted.split(".")
    spec, file = _find_top(name), None
    while spec is not None:
        file = spec.origin if spec.has_location else file
        if not below:
            break
        name = f"{name}.{below.pop(0)}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or [])
    file = file or getattr(sys.modules.get(dotted.rpartition(".")[0]), "__file__", None)
    return Path(file).resolve() if file else None


def _find_top(name: str) -> ModuleSpec | None:
    """Where a module that is in no package would be imported from; the current folder comes last."""
    try:
        found = find_spec(name)
    except (ImportError, ValueError):  # as for __main__
        found = None
    return found or PathFinder.find_spec(name, [str(Path.cwd())])


def _add_current_folder(dotted: str) -> None:
    """Lets a dotted path name a module of the user's in the current folder, which is not searched for anything else.

    If it always were, a folder of somebody else's could answer for any module that is not installed.
    """
    top, dot, _ = dotted.partition(".")
    folder = str(Path.cwd())
    if not dot or not top.isidentifier() or top in sys.modules or folder in sys.path:
        return
    spec = _find_top(top)
    if spec is not None and spec.origin and Path(spec.origin).is_relative_to(folder):
        sys.path.append(folder)  # last


def name_files(recipe: str) -> str:
    """A recipe's text in which classes of the user's own top-level modules are named by file."""
    return re.sub(r"(?<=class_path: )(\w+)\.(\w+)$", _by_file, recipe, flags=re.MULTILINE)


def _by_file(found: re.Match[str]) -> str:
    file = getattr(sys.modules.get(found[1]), "__file__", None)
    return found[0] if file is None or is_installed(Path(file)) else f"{Path(file).resolve()}:{found[2]}"


def is_installed(file: Path) -> bool:
    """Whether a file belongs to an installed package, or to Python."""
    return any(file.resolve().is_relative_to(place) for place in INSTALLED)


def load(text: str) -> Any:
    """The content of a recipe's YAML; every ``file.py:Name`` that stands for a class is imported."""
    return resolve(load_yaml(text))
