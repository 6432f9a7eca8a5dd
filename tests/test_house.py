"""The house rules, read from the syntax tree: who imports whom, who may know which outsider, how the code reads."""

import ast
import importlib
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # room -> rooms it may import from
    "ltm_pyro": {"ltm_pyro"},
    "models": {"models", "ltm_pyro"},
    "guides": {"guides", "ltm_pyro"},
    "studies": {"studies", "models", "guides", "ltm_pyro"},
}
DOORS = {  # outsider -> the files that may know it, and how many of them
    "xformers": ("ltm_pyro/nn/attention.py", 1),
    "pytorch_lightning": ("ltm_pyro/training/*.py", 99),
    "webdataset": ("ltm_pyro/data/*.py", 2),
    "fsspec": ("ltm_pyro/data/*.py", 1),
    "xarray": ("ltm_pyro/analysis/**/*.py", 99),
    "arviz": ("ltm_pyro/analysis/arviz.py", 1),
    "sklearn": ("ltm_pyro/**/*.py", 2),
    "safetensors": ("ltm_pyro/runs/*.py", 1),
    "lm_eval": ("ltm_pyro/evaluation/lm_eval.py", 1),
    "jinja2": ("ltm_pyro/analysis/report.py", 1),
    "optuna": ("studies/**/*.py", 99),
    "sqlalchemy": ("studies/search/storage.py", 1),
}
FILES = {path: ast.parse(path.read_text()) for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))}
OUTSIDE = [path for folder in ("tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; ``from a import b`` is both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "."
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room(name: str) -> str | None:
    """The room a dotted name lives in, None for third parties."""
    first, second, *_ = [*name.split("."), "", ""]
    if first != "ltm_pyro":
        return None
    return second if second in MAY_IMPORT else first


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def functions() -> Iterator[tuple[Path, Function]]:
    for path, tree in FILES.items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[bool(ast.get_docstring(function)) :]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def public(owner: ast.Module | ast.ClassDef) -> Iterator[ast.AST]:
    """The owner's public functions and classes, and theirs."""
    yield owner
    for node in owner.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node) if isinstance(node, ast.ClassDef) else (node,)


def test_imports_run_one_way():
    backwards = [
        f"{where(path, line)} imports {name}"
        for path, tree in FILES.items()
        for line, name in imports(tree)
        if room(name) and room(name) not in MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    ]
    assert not backwards


def test_no_bare_import_of_a_room():
    """``import models`` works from the repository root, and loads a second copy of every class."""
    trees = FILES | {path: ast.parse(path.read_text()) for path in OUTSIDE}
    bare = [
        f"{where(path, line)} imports {name}"
        for path, tree in trees.items()
        for line, name in imports(tree)
        if name.split(".")[0] in {"models", "guides", "studies", ""}
    ]
    assert not bare


def test_every_module_loads_once():
    for path in (path.relative_to(ROOT) for path in FILES if path.name not in ("__main__.py", "lm_eval.py")):
        parts = path.with_suffix("").parts
        name = ".".join(parts if parts[0] == "ltm_pyro" else ("ltm_pyro", *parts)).removesuffix(".__init__")
        importlib.import_module(name)
    assert not {"models", "guides", "studies"} & set(sys.modules)


@pytest.mark.parametrize("outsider", DOORS)
def test_every_outsider_has_one_door(outsider):
    pattern, most = DOORS[outsider]
    knowing = {path for path, tree in FILES.items() for _, name in imports(tree) if name.split(".")[0] == outsider}
    allowed = set(ROOT.glob(pattern))
    assert not [str(path.relative_to(ROOT)) for path in knowing - allowed]
    assert len(knowing) <= most, sorted(knowing)


def test_only_models_and_guides_sample():
    sampling = [
        where(path, node.lineno)
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"pyro.sample", "pyro.primitives.sample"}
    ]
    sampling += [
        where(path, line)
        for path, tree in FILES.items()
        for line, name in imports(tree)
        if name in {"pyro.sample", "pyro.primitives.sample"}
    ]
    assert not [place for place in sampling if not place.startswith(("models/", "guides/"))]


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    names = {
        ".".join(folder.parts if folder.parts[0] == "ltm_pyro" else ("ltm_pyro", *folder.parts)) for folder in folders
    }
    assert names == set(settings["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in [*FILES, *OUTSIDE]}
    assert not {name: count for name, count in lines.items() if count > 400}


def test_functions_are_short():
    sizes = sorted(body_lines(function) for _, function in functions())
    assert statistics.median(sizes) < 10
    assert statistics.quantiles(sizes, n=10)[-1] < 30


def test_public_names_are_documented():
    silent = [
        where(path, getattr(node, "lineno", 1))
        for path, tree in FILES.items()
        for node in public(tree)
        if not ast.get_docstring(node) and not (isinstance(node, ast.Module) and not node.body)
    ]
    assert not silent


def test_arguments_are_annotated():
    bare = []
    for path, function in functions():
        a = function.args
        named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare += [
            f"{where(path, argument.lineno)} {function.name}({argument.arg})"
            for argument in named
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
    assert not bare
