"""Whose code a recipe may name: ours, classes that the user has registered, and what the user trusts or has trained.

A recipe names classes, and loading a run imports and calls them. A run may come from anybody, so its recipe is looked
through as data first; nothing that it names is imported before `check_code` has agreed.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import yaml

from ltm_pyro.errors import UsageError
from ltm_pyro.training.plugins import IN_FILE, PARTS, is_installed, locate, module_file
from ltm_pyro.utils.safe_yaml import load_yaml

CLASS_KEYS = {"class_path", "callbacks", "logger", "plugins", *PARTS}  # of a recipe: their values name classes
SOURCE = re.compile(r"^# sha256 of (?P<file>.*): (?P<digest>[0-9a-f]{64})$", re.MULTILINE)  # ends a recipe
COPIES = "code"  # of a run or an export: the folder with copies of the user's files that its recipe needs
STORE = Path("ltm_pyro") / "trusted.jsonl"  # in the user's data folder: one line for each recipe trained here
TEXTS = 5  # of YAML, one inside the other
Class = TypeVar("Class")

_registered: list[type] = []
_own: dict[str, dict[str, str]] = {}  # recipes trained in this process: digest to the files they use, with digests


def register_class(cls: Class) -> Class:
    """Lets runs name a prior, guide, decoder or joint model of one's own; returns the class, so that it decorates.

    A run whose recipe names this class, by dotted path or by the file that defines it, is then loaded without trust:
    the class that is registered is called, and no file is imported for it.

    Raises:
        UsageError: it is not a class.
    """
    if not isinstance(cls, type):
        raise UsageError(f"{cls!r} is not a class: register the class itself, no function and no object.")
    _registered.append(cls)
    return cls


@cache
def _exported() -> dict[str, type]:
    """The classes of our models and guides by each of their names."""
    rooms = ("ltm_pyro.models", "ltm_pyro.guides")  # by dotted path: this room imports no model and no guide
    classes = {
        (room, name): getattr(import_module(room), name) for room in rooms for name in import_module(room).__all__
    }
    names = {f"{room}.{name}": cls for (room, name), cls in classes.items()} | {n: c for (_, n), c in classes.items()}
    return names | {_dotted(cls): cls for cls in classes.values()}


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def known_class(name: str) -> type | None:
    """The class of ours, or the registered one, that a recipe's ``name`` means; None if it means another."""
    if name in _exported():
        return _exported()[name]
    found = IN_FILE.fullmatch(name)
    for cls in reversed(_registered):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if name == _dotted(cls):
            return cls
        if found and file and cls.__qualname__ == found["name"] and Path(file).name == Path(found["file"]).name:
            return cls
    return None


def code_names(content: Any, at_class: bool = False, texts: int = 0) -> Iterator[str]:
    """Every class, function and file that a part of a recipe names, in order, also those inside ``init_args``.

    A text that is YAML itself counts as what it says, because the parser of recipes reads it so; ``texts`` of such
    texts are around ``content``. Raises `UsageError` if there are more than `TEXTS`.
    """
    if texts > TEXTS:
        raise UsageError(f"A recipe has YAML in texts, {texts} inside of each other: write it out, and not as a text.")
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from code_names(value, str(key).rpartition(".")[2].rstrip("+") in CLASS_KEYS, texts)
    elif isinstance(content, list | tuple | set):
        for value in content:
            yield from code_names(value, at_class, texts)
    elif isinstance(content, str):
        inside: Any = None
        with suppress(yaml.YAMLError):
            inside = load_yaml(content)
        if isinstance(inside, Mapping | list | set) or (isinstance(inside, str) and inside != content):
            yield from code_names(inside, at_class, texts + 1)
        elif content and (at_class or IN_FILE.fullmatch(content) or _is_dotted(content)):
            yield content


def of_code(recipe: Any) -> dict[str, Any]:
    """The part of a whole recipe that may name code; the rest are numbers, and names of files and folders."""
    if not isinstance(recipe, Mapping):
        return {}
    places = ("run", "ckpt_path", "warm_start", "data", "config")
    return {key: value for key, value in recipe.items() if str(key).partition(".")[0] not in places}


def check_plain(recipe: Any, sections: Iterable[str], source: object) -> None:
    """Refuses a recipe of others' in which a text is more than a text, as the parser of recipes would read it.

    That parser opens a file where a section is a text, and reads YAML in every text; what is in there would have been
    checked by nobody. Where classes are named, `check_code` has looked at such texts.

    Args:
        sections: the keys whose values are mappings.

    Raises:
        UsageError: a section is a text, a text names another recipe or is YAML itself outside of the model.
    """
    sections = {*sections}
    for key, value in _texts(recipe):
        shown = f"`{_printable(key)}` of {source} is {_printable(value)!r}"
        if key in sections:
            raise UsageError(f"{shown}, and no section: a recipe of somebody else's is not read from several files.")
        if key.partition(".")[0] == "config":
            raise UsageError(f"{shown}: a recipe of somebody else's does not name another one.")
        inside: Any = None
        with suppress(yaml.YAMLError):
            inside = load_yaml(value)
        if isinstance(inside, Mapping | list | set) and not key.startswith(("model.", "trainer.")):
            raise UsageError(f"{shown}, which is YAML and not a name: write a name.")
        if key.startswith(("model.", "trainer.", "checkpoints.")) and _is_file(value):
            raise UsageError(f"{shown}, a file: a recipe of somebody else's is not read from several files.")


def _is_file(text: str) -> bool:
    with suppress(OSError, ValueError, RuntimeError):  # no path at all, or in a home that is not there
        return Path(text).expanduser().is_file()
    return False


def _texts(content: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Every text of nested mappings and lists with its dotted key; a key with dots in it counts as so many keys."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _texts(value, f"{above}.{str(key).rstrip('+')}".removeprefix("."))
    elif isinstance(content, list | tuple | set):
        for value in content:
            yield from _texts(value, above)
    elif isinstance(content, str):
        yield above, content


def _is_dotted(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))


def check_code(content: Any, recipe: str, source: object, trust: bool = False) -> bool:
    """Refuses a part of a recipe that names code of others, unless it is trusted; then lists that code on stderr.

    Args:
        content: what will be parsed and built.
        recipe: the text that it is from; the user's own, trained here and with its files unchanged, is not refused.
        source: the run or file, for messages.
        trust: the user's consent.

    Returns:
        Whether code of others may be executed.

    Raises:
        UsageError: there is such code, and no consent.
    """
    foreign = [name for name in dict.fromkeys(code_names(content)) if known_class(name) is None]
    for name in foreign:
        if found := IN_FILE.fullmatch(name):
            locate(Path(found["file"]))  # whose message about a file that has gone says more
    if not foreign:
        return trust
    if not trust and is_own(recipe):
        return True
    if not trust:
        raise UsageError(
            f"{source} names code that is not ltm_pyro's: {', '.join(map(_printable, foreign))}; to load it is to "
            f"execute that code: read it, then add --trust (in Python trust=True, or ltm_pyro.register_class)."
        )
    trained = dict(SOURCE.findall(recipe))
    lines = [_description(name, trained) for name in foreign]
    print("\n".join((f"Trusted: {_printable(str(source))} imports and executes", *lines)), file=sys.stderr)
    return True


def check_classes(parts: Mapping[str, Any], source: object, free: bool) -> None:
    """Refuses parsed `PARTS` of a model that are no classes, or, unless ``free``, that are not known ones.

    Raises:
        UsageError: names the part; nothing has been called by then.
    """
    for name, part in parts.items():
        if callable(part) or not isinstance(part, Mapping):
            raise UsageError(f"`model.{name}` of {source} is {_printable(str(part))}, which is no class: name a class.")
        for path in _class_paths(part):
            cls = resolve_name(path)
            if not isinstance(cls, type):
                raise UsageError(f"`model.{name}` of {source} names {path}, which is no class: name a class.")
            if not free and cls not in (*_exported().values(), *_registered):
                raise UsageError(f"`model.{name}` of {source} names {path}, which is not ltm_pyro's: add --trust.")
        if missing := list(_without_value(part)):
            raise UsageError(
                f"`model.{name}` of {source} has no value for {', '.join(missing)}: leave it out, or give one."
            )
        if extra := list(_beyond_signature(part, free)):
            names = ", ".join(map(_printable, extra))
            raise UsageError(f"`model.{name}` of {source} has arguments that its class does not take: {names}.")


def _nested(value: Any) -> Iterator[Any]:
    """A parsed part and everything inside it, the outermost first."""
    yield value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple | set) else ()
    for inner in inside:
        yield from _nested(inner)


def _class_paths(part: Any) -> Iterator[str]:
    """The class paths of a parsed part, the outermost first."""
    yield from (x["class_path"] for x in _nested(part) if isinstance(x, Mapping) and "class_path" in x)


def _beyond_signature(part: Any, free: bool) -> Iterator[str]:
    """Arguments of a parsed part that are not in the signature of its class; unless ``free``, functions as well."""
    for value in _nested(part):
        if isinstance(value, Mapping) and "class_path" in value:
            known = signature(resolve_name(value["class_path"])).parameters
            given = [*(value.get("init_args") or {}), *(value.get("dict_kwargs") or {})]
            takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
            yield from (str(key) for key in given if not takes_any and key not in known)
        elif callable(value) and not isinstance(value, Mapping | list | tuple | set) and not free:
            yield str(value)


def _without_value(part: Any) -> Iterator[str]:
    """Arguments that are null in a parsed part, and that its class takes no None for; the parser lets them pass."""
    for value in _nested(part):
        if isinstance(value, Mapping) and "class_path" in value:
            known = signature(resolve_name(value["class_path"])).parameters
            for key, given in (value.get("init_args") or {}).items():
                default = known[key].default if key in known else None
                if given is None and isinstance(default, bool | int | float | str):
                    yield str(key)


def _description(name: str, trained: Mapping[str, str]) -> str:
    file = _file(name)
    if file is None:
        return f"  {_printable(name)}: no such module"
    by_name = {Path(path).name: digest for path, digest in trained.items()}  # of a copy that came with the run
    before = trained.get(str(file)) or by_name.get(file.name)
    since = "not noted" if before is None else "unchanged" if before == _digest(file) else "CHANGED"
    return f"  {_printable(name)}:{_description_of(file)}, {since} since training"


def _description_of(file: Path) -> str:
    return f"  {_printable(str(file))}, SHA-256 {_digest(file)}"


def _printable(text: str) -> str:
    """A text of somebody else's for the terminal: without control characters, and not long."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _file(name: str) -> Path | None:
    """The file that the name would import."""
    found = IN_FILE.fullmatch(name)
    return locate(Path(found["file"])) if found else module_file(name)


def _digest(file: Path) -> str:
    with suppress(OSError):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return "unreadable"


def source_lines(recipe: str) -> str:
    """The lines that end a recipe: the SHA-256 of every file of the user's, or of a third package, that it names."""
    names = [name for name in code_names(load_yaml(recipe)) if name not in _exported()]
    files = sorted({file for file in map(_file, names) if file is not None})
    return "".join(f"# sha256 of {file}: {_digest(file)}\n" for file in files)


def own_sources(recipe: str) -> dict[str, bytes]:
    """The user's files that a recipe names, and what was imported with them from their folders, by name."""
    files = map(Path, _imported(Path(file) for file, _ in SOURCE.findall(recipe)))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def copies_beside(source: object) -> Path | None:
    """The folder `COPIES` of a run, an export, or the run of a checkpoint or recipe; None if there is none."""
    places = [Path(str(source)), *Path(str(source)).parents[:2]]
    return next((place / COPIES for place in places if (place / COPIES).is_dir()), None)


def may_read_data(place: str, recipe: str, trust: bool = False) -> bool:
    """Whether the data that a run names are touched unasked: trusted, the user's own, or below the current folder."""
    if trust or is_own(recipe):
        return True
    return "://" not in place and "::" not in place and Path(place).resolve().is_relative_to(Path.cwd())


def remember_recipe(recipe: str) -> None:
    """Notes, for this process and in the user's data folder, that the user has trained a recipe here.

    What is noted are the digest of the recipe, and those of the files of the user's that the training has imported.
    """
    _note(_digest_of(recipe), _imported(Path(file) for file, _ in SOURCE.findall(recipe)))


def remember_file(file: Path) -> None:
    """The same for a file of the user's own that the user has executed, such as a study's."""
    _note(_digest(file), _imported([file.resolve()]))


def _note(digest: str, files: dict[str, str]) -> None:
    _own[digest] = files
    if _stored().get(digest) == files:
        return
    line = json.dumps({"digest": digest, "files": files}) + "\n"
    try:
        _store().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(_store(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(line)
    except OSError as error:
        print(
            f"{_store()} cannot be written ({error.strerror}): other commands will ask for --trust where they need "
            f"code of yours or data outside the current folder.",
            file=sys.stderr,
        )


def _imported(named: Iterable[Path]) -> dict[str, str]:
    """The digests of files that are not installed, and of every module of this process from their folders."""
    files = {file for file in named if not is_installed(file)}
    folders = {file.parent for file in files}
    loaded = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    files |= {Path(file) for file in loaded if file and Path(file).parent in folders}
    return {str(file): _digest(file) for file in sorted(files)}


def is_own(recipe: str) -> bool:
    """Whether this user has trained a recipe, here or in an earlier process, and its files are as they were then.

    The files are those that would be imported now: a module of the same name in the current folder is another one.
    """
    files = _unchanged(_digest_of(recipe))
    if files is None:
        return False
    named = (_file(name) for name in code_names(load_yaml(recipe)) if known_class(name) is None)
    return all(file is None or str(file) in files or is_installed(file) for file in named)


def is_own_file(file: Path) -> bool:
    """Whether this user has executed a file before, and it is unchanged; one of another name is not even opened."""
    name = str(file.resolve())
    if not any(name in files for files in (*_own.values(), *_stored().values())):
        return False
    return name in (_unchanged(_digest(file)) or {})


def _unchanged(digest: str) -> dict[str, str] | None:
    """The files noted with a digest; None if nothing is noted, or one of them has changed."""
    files = _own.get(digest, _stored().get(digest))
    same = files is not None and all(_digest(Path(file)) == before for file, before in files.items())
    return files if same else None


def list_file(file: Path, source: object) -> None:
    """Says on stderr that a file which ``source`` names is trusted, and will be executed."""
    print(f"Trusted: {_printable(str(source))} executes\n{_description_of(file)}", file=sys.stderr)


def _digest_of(recipe: str) -> str:
    return hashlib.sha256(recipe.encode("utf-8", "surrogatepass")).hexdigest()


def _store() -> Path:
    folder = os.environ.get("XDG_DATA_HOME", "")
    return (Path(folder) if Path(folder).is_absolute() else Path.home() / ".local" / "share") / STORE


def _stored() -> dict[str, dict[str, str]]:
    """The recipes noted in the user's data folder; a line that was cut is left out, and so is another user's file."""
    found: dict[str, dict[str, str]] = {}
    try:
        owner, text = _store().stat().st_uid, _store().read_text("utf-8")
    except (OSError, ValueError):
        return found
    if owner == os.getuid():
        for line in text.splitlines():
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                found[entry["digest"]] = dict(entry["files"])
    return found
