"""The words that code, recipes and documents use: identifiers, options and keys, prose left out."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent


class Use(NamedTuple):
    """A word of the code, the place and the kind of place where it is."""

    word: str
    kind: str
    place: str


def uses_in_code(code: str, place: str) -> Iterator[Use]:
    """The identifiers of a piece of Python, and its strings that name an option, a key or a public name."""
    for node in ast.walk(ast.parse(code)):
        where = f"{place}:{getattr(node, 'lineno', 1)}"
        match node:
            case ast.Name(id=name):
                yield Use(name, "name", where)
            case ast.Attribute(value, attr):
                yield Use(attr, "attribute", where)
                if re.search(r"(inference|guide|evaluation)$", ast.unparse(value)):
                    yield Use(attr, "our attribute", where)
            case ast.FunctionDef(name=name, args=arguments):
                yield Use(name, "definition", where)
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                yield from (Use(each.arg, "argument", where) for each in every)
            case ast.ClassDef(name=name, body=body):
                yield Use(name, "definition", where)
                methods = [each for each in body if isinstance(each, ast.FunctionDef)]
                yield from (Use(each.name, "method", f"{place}:{each.lineno}") for each in methods)
                if place.startswith(("models/", "ltm_pyro/nn/")):
                    yield from (Use(each.name, "method of a model", f"{place}:{each.lineno}") for each in methods)
                fields = [each for each in body if isinstance(each, ast.AnnAssign)]
                yield from (Use(ast.unparse(each.target), "argument", f"{place}:{each.lineno}") for each in fields)
            case ast.Call(func=function, keywords=keywords):
                if isinstance(function, ast.Attribute):
                    yield Use(function.attr, "method", where)
                for each in keywords:
                    yield Use(each.arg or "", "keyword", where)
                    if ast.unparse(function).endswith(("Inference", "replace", "init", "_replace")):
                        yield Use(each.arg or "", "our keyword", where)
            case ast.ImportFrom(module=module, names=names) if (module or "").startswith("ltm_pyro"):
                yield from (Use(each.name, "import", where) for each in names)
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=listed)):
                yield from (Use(str(ast.literal_eval(each)), "public", where) for each in listed)
            case ast.Dict(keys=keys):
                yield from (Use(key.value, "key", where) for key in keys if _is_text(key))
            case ast.Subscript(slice=key) if _is_text(key):
                yield Use(key.value, "key", where)
            case ast.Constant(value=str(text)):
                yield from uses_in_shell(text, where)


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def uses_in_shell(text: str, place: str) -> Iterator[Use]:
    """The options in a command, or in a string: ``--top-k`` is top_k, and ``--model.guide.rank`` has three words."""
    for option in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", text):
        yield from (Use(word.replace("-", "_"), "option", place) for word in option.split("."))


def uses_in_yaml(content: Any, place: str) -> Iterator[Use]:
    """The keys of a recipe, at every depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from (Use(word, "recipe key", place) for word in str(key).split("."))
            yield from uses_in_yaml(value, place)
    if isinstance(content, list):
        for each in content:
            yield from uses_in_yaml(each, place)


def uses_in_markdown(text: str, place: str) -> Iterator[Use]:
    """The blocks of code; prose is not looked at."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            yield from uses_in_code(code, place)
        elif language == "yaml":
            yield from uses_in_yaml(yaml.safe_load(code), place)
        else:
            yield from uses_in_shell(code, place)


def uses_of(path: Path) -> Iterator[Use]:
    """What one file of the repository uses."""
    text, place = path.read_text(), str(path.relative_to(ROOT))
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells, 1):
            yield from uses_in_code(re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE), f"{place} cell {number}")
    elif path.suffix in (".py", ".txt"):  # templates are Python with other names
        yield from uses_in_code(text, place)
    elif path.suffix == ".yaml":
        yield from uses_in_yaml(yaml.safe_load(text), place)
    elif path.suffix == ".md":
        yield from uses_in_markdown(text, place)
    else:
        yield from uses_in_shell(text, place)
