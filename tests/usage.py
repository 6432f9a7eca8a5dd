"""Who uses what is public: every option of ``ltm``, key of a recipe and public name, with its users, one line each.

    .venv/bin/python -P tests/usage.py          # those without a user come last

A user is a recipe, study, benchmark, example, test or document that has the name in its code. An option counts where
its command is named as well: in the same function of Python, the same line of a shell, the same document.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # folder or file -> what is in it; the first that holds a file counts
    "studies/recipes": "recipe",
    "studies": "study",
    "benchmarks": "benchmark",
    "examples": "example",
    "tests": "test",
    "docs": "document",
    "README.md": "document",
    "CONTRIBUTING.md": "document",
}
SUFFIXES = (".py", ".yaml", ".md", ".ipynb", ".sh", ".sbatch")
APART = {"usage.py", "test_usage.py", "words.py", "test_names.py", "test_house.py"}  # they speak about names
CLASSES = {  # class -> the key of a recipe below which its arguments are
    "Saving": "checkpoints",
    "LTMModule": "model",
    "Decoder": "model.decoder",
    "LocalInference": "model.inference",
    "Init": "model.inference.init",
    "Stop": "model.inference.stop",
    "SlowRate": "model.slow",
    "Curriculum": "model.curriculum",
    "PackedData": "data",
}
FILLED_IN = {"model.seed", "data.seed"}  # from seed_everything
GIVEN = {"shape", "model", "args", "kwargs"}  # what training gives to a prior or a guide


def public_names() -> list[str]:
    """``module.name`` of everything in ``__all__`` of the package, its analysis, its models and its guides."""
    modules = ("ltm_pyro", "ltm_pyro.analysis", "ltm_pyro.models", "ltm_pyro.guides")
    return [f"{module}.{name}" for module in modules for name in import_module(module).__all__]


def options() -> list[str]:
    """``command --option`` of every command but ``ltm fit``, whose options are the keys of a recipe."""
    from ltm_pyro.cli.arguments import Parser
    from ltm_pyro.cli.main import COMMANDS

    found = []
    for command in COMMANDS.keys() - {"fit"}:
        parser = Parser(prog=f"ltm {command}")
        import_module(COMMANDS[command][0]).add_arguments(parser)
        found += [f"{command} {a.option_strings[-1]}" for a in parser._actions if a.option_strings and a.dest != "help"]
    return sorted(found)


def recipe_keys() -> list[str]:
    """Every key of a recipe that is ours: Lightning's below ``trainer`` are its own affair.

    ``model.evaluation`` has the fields of ``model.inference``, which count once. The arguments of a prior or a guide
    are under its name, as in ``MixturePrior.components``.
    """
    from ltm_pyro import guides, models
    from ltm_pyro.inference.state import Stop
    from ltm_pyro.training.recipe import recipe_parser

    keys = {action.dest for action in recipe_parser()._actions} - {"help", "config", "print_config"} - FILLED_IN
    keys = {key for key in keys if not key.endswith(".help") and not key.startswith(("trainer", "model.evaluation."))}
    keys |= {f"model.decoder.{name}" for name in inspect.signature(models.Decoder).parameters}
    keys |= {f"model.inference.stop.{name}" for name in inspect.signature(Stop).parameters}
    classes = {name: getattr(models, name) for name in models.__all__ if name.endswith("Prior")}
    classes |= {name: getattr(guides, name) for name in guides.__all__}
    for name, cls in classes.items():
        keys |= {f"{name}.{argument}" for argument in inspect.signature(cls).parameters if argument not in GIVEN}
    return sorted(key for key in keys if not any(other.startswith(f"{key}.") for other in keys))


class Words(NamedTuple):
    """What a file has in its code: names, keys (a path's last part, and its last two), and words by statement."""

    names: set[str]
    keys: set[str]
    statements: list[set[str]]


@cache
def words_of(path: Path) -> Words:
    """The words of a file's code."""
    text, found = path.read_text(), Words(set(), set(), [])
    if path.suffix == ".py":
        _python(text, found)
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            read = _python if cell["cell_type"] == "code" else _markdown
            read(re.sub(r"^[%!].*", "", "".join(cell["source"]), flags=re.MULTILINE), found)
    elif path.suffix == ".yaml":
        found.keys.update(_keys(yaml.safe_load(text)))
        found.names.update(re.findall(r"\w+", " ".join(re.findall(r"class_path: (\S+)", text))))
    elif path.suffix == ".md":
        _markdown(text, found)
    else:
        _shell(text, found)
    paths = [re.sub(r"\.(init_args|class_path)\b", "", path).split(".") for path in found.keys]
    return found._replace(keys={".".join(path[-depth:]) for path in paths for depth in (1, 2)})


def _python(text: str, found: Words) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.names.add(name)
            case ast.Call(func=function, keywords=keywords):
                called = ast.unparse(function).rpartition(".")[2]
                found.keys.update(f"{CLASSES.get(called, called)}.{each.arg}" for each in keywords)
            case ast.Dict():
                found.keys.update(_keys(_literal(node)))
            case ast.Constant(value=str(string)):
                found.names.update(re.findall(r"\w+", string) if "." in string and " " not in string else [string])
                if path := re.match(r"(--)?[a-zA-Z]\w*(\.\w+)*(?=$|=)", string):
                    found.keys.add(path[0].removeprefix("--"))
    statements = [each for top in tree.body for each in (top.body if isinstance(top, ast.ClassDef) else [top])]
    for statement in statements:
        strings = [x.value for x in ast.walk(statement) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
        found.statements.append({word for string in strings for word in string.split()})


def _literal(node: ast.Dict) -> dict[str, Any]:
    """The keys of a dictionary in code, and of those inside; of a value that is a string, the string."""
    inside = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            inside[key.value] = _literal(value) if isinstance(value, ast.Dict) else getattr(value, "value", None)
    return inside


def _keys(content: Any, above: str = "") -> Iterator[str]:
    """The paths of nested keys, without the words of class_path and init_args, and by class where there is one."""
    if isinstance(content, list):
        for each in content:
            yield from _keys(each, above)
    if isinstance(content, dict):
        name = str(content.get("class_path", "")).rpartition(".")[2]
        for key, value in content.items():
            here = above if key == "init_args" else f"{above}.{str(key).split(' ')[0]}".removeprefix(".")
            yield here
            yield from _keys(value, here)
            if key == "init_args" and isinstance(value, dict):
                yield from (f"{name}.{argument}" for argument in value)


def _markdown(text: str, found: Words) -> None:
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "yaml":
            found.keys.update(_keys(yaml.safe_load(code)))
        else:
            (_python if language == "python" else _shell)(code, found)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for span in spans:
        found.names.update(re.findall(r"\w+", span))
        found.keys.update(re.findall(r"[\w.]+", span))
    commands = {word for words in found.statements if "ltm" in words for word in words if not word.startswith("-")}
    found.statements.append(commands | {word for span in spans for word in span.split()})
    sections = {word for word in found.names | found.keys if word in {*CLASSES, *CLASSES.values()}}
    found.keys.update(f"{CLASSES.get(section, section)}.{span}" for section in sections for span in spans)


def _shell(text: str, found: Words) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = set(line.replace("=", " ").split())
        found.statements.append(words)
        found.keys.update(word.removeprefix("--") for word in words if word.startswith("--"))
        found.names.update(re.findall(r"\w+", line))


def is_used(name: str, words: Words, alone: bool = False) -> bool:
    """Whether a file's words have a public name, a recipe's key or a command's option.

    A key is known by its last two parts, and by the last where no other key ends so (``alone``).
    """
    if name.startswith("ltm_pyro."):
        return name.rpartition(".")[2] in words.names
    if " --" in name:
        *command, option = name.split()
        return any({*command, option} <= statement for statement in words.statements)
    tail = name.split(".")[-2:]
    ends = {".".join(tail)}
    if tail[0] == "inference":
        ends.add(f"evaluation.{tail[1]}")
    if tail[0][0].isupper():  # the argument of a prior or a guide
        ends |= {f"{part}.{tail[1]}" for part in ("prior", "guide") if tail[0] in words.names}
    return bool(words.keys & (ends | ({tail[-1]} if alone else set())))


def files() -> dict[Path, str]:
    """Every file that may use something, and what it is."""
    found: dict[Path, str] = {}
    for place, kind in KINDS.items():
        for path in [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*")):
            if path.suffix in SUFFIXES and path.name not in APART:
                found.setdefault(path, kind)
    return found


def users() -> dict[str, list[str]]:
    """Of every option, key and public name the files that use it."""
    keys = recipe_keys()
    ends = [key.rpartition(".")[2] for key in keys]
    alone = {key for key, end in zip(keys, ends, strict=True) if ends.count(end) == 1}
    found: dict[str, list[str]] = {name: [] for name in [*public_names(), *options(), *keys]}
    for path, kind in files().items():
        for name, those in found.items():
            if is_used(name, words_of(path), name in alone):
                those.append(f"{kind} {path.relative_to(ROOT)}")
    return found


if __name__ == "__main__":
    for name, found in sorted(users().items(), key=lambda item: not item[1]):
        print(f"{name}: {', '.join(found) or 'no user'}")
