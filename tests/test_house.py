"""The house rules, read from the syntax tree: who imports whom, who may know which outsider, what is documented."""

import ast
import importlib
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # room -> rooms it may import from; only the roof, ltm_pyro/cli, may look into every room
    "ltm_pyro": {"ltm_pyro"},
    "models": {"models", "ltm_pyro"},
    "guides": {"guides", "ltm_pyro"},
    "studies": {"studies", "models", "guides", "ltm_pyro"},
}
LAYERS = (  # from the ground up: an import may only go down, inside functions as well
    ("errors",),
    ("utils",),
    ("contracts",),
    ("nn",),
    ("inference",),
    ("models", "guides"),
    ("data",),
    ("training",),
    ("runs",),
    ("text",),
    ("evaluation",),
    ("analysis",),
    ("studies",),
    ("cli",),
    ("ltm_pyro",),  # ltm_pyro/__init__.py, which loads the public names when they are asked for
)
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


class Import(NamedTuple):
    """A dotted name that a line imports; a lazy import runs inside a function, or is for the type checker alone."""

    line: int
    name: str
    lazy: bool


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Everything imported: ``from a import b`` is a.b, and a relative import begins with a dot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(node.lineno, f"{module}.{alias.name}", lazy) for alias in node.names)
        else:
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, lazy or for_types or isinstance(node, Function | ast.Lambda))


def module_name(path: Path) -> str:
    """The installed name of a file given from the root: the client's folders are sub-packages of ltm_pyro."""
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[0] == "ltm_pyro" else ("ltm_pyro", *parts)).removesuffix(".__init__")


ImportMap = Mapping[str, list[Import]]  # by module of the house: the modules of the house that it imports


def import_map(trees: Mapping[Path, ast.AST], root: Path = ROOT) -> ImportMap:
    """Who imports whom inside the house."""
    modules = {module_name(path.relative_to(root)): tree for path, tree in trees.items()}

    def home(name: str) -> str:  # the longest beginning of a dotted name that is a module
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        module: [each._replace(name=home(each.name)) for each in imports(tree) if home(each.name) not in ("", module)]
        for module, tree in modules.items()
    }


def room(name: str) -> str | None:
    """The top-level folder a dotted name lives in, None for third parties."""
    first, second, *_ = [*name.split("."), "", ""]
    if first != "ltm_pyro":
        return None
    return second if second in MAY_IMPORT else first


def layer(module: str) -> str:
    """The room of ltm_pyro (as installed) that a module lives in."""
    return [*module.split("."), "ltm_pyro"][1]


def upward(found: ImportMap) -> list[str]:
    """The imports that go against the order of `LAYERS`."""
    height = {name: index for index, names in enumerate(LAYERS) for name in names}
    return [
        f"{module}:{each.line} imports {each.name}"
        for module, those in found.items()
        for each in those
        if layer(each.name) != layer(module) and height[layer(each.name)] >= height[layer(module)]
    ]


def circle_of_files(found: ImportMap) -> list[str]:
    """Modules that wait for each other when they load, in order; empty where there are none."""
    return _circle({module: {each.name for each in those if not each.lazy} for module, those in found.items()})


def circle_of_folders(found: ImportMap) -> list[str]:
    """Folders that import each other, lazily or not, in order; empty where there are none.

    An import from a.b.c to a.d.e goes from the entry b of the folder a to its entry d: what is inside b and d does not
    matter. So a folder may use files beside it, as long as these do not need it back.
    """
    folders = {module[:end] for module in found for end, letter in enumerate(module) if letter == "."}
    graph: dict[str, set[str]] = {}
    for module, those in found.items():
        for each in those:
            one, other = _entries(module, each.name)
            if folders & {one, other}:
                graph.setdefault(one, set()).add(other)
    return _circle(graph)


def _entries(one: str, other: str) -> tuple[str, str]:
    """Two modules as entries of the deepest folder that holds both; a folder's own file is its ``__init__``."""
    pair = ([*one.split("."), "__init__"], [*other.split("."), "__init__"])
    depth = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
    return ".".join(pair[0][: depth + 1]), ".".join(pair[1][: depth + 1])


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def entries(folder: Path) -> list[str]:
    """What a reader sees at ``ls``, but for what every package has."""
    usual = {"__init__.py", "py.typed", "__pycache__"}
    return sorted(path.name for path in folder.iterdir() if path.name not in usual)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def functions() -> Iterator[tuple[Path, Function]]:
    for path, tree in FILES.items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, Function))


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
        if "cli" not in path.relative_to(ROOT).parts[:2]
        for line, name, _ in imports(tree)
        if room(name) and room(name) not in MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    ]
    assert not backwards


def test_layers_are_imported_downwards():
    found = import_map(FILES)
    assert {layer(module) for module in found} <= {name for names in LAYERS for name in names}, "a room without a layer"
    assert not upward(found)


def test_no_files_import_in_a_circle():
    assert not circle_of_files(import_map(FILES))


def test_no_folders_import_in_a_circle():
    assert not circle_of_folders(import_map(FILES))


def test_the_package_is_seen_at_first_sight():
    assert len(entries(ROOT / "ltm_pyro")) <= 13, entries(ROOT / "ltm_pyro")


@pytest.fixture
def plant(tmp_path):
    """Writes files into a small house and reads who imports whom there."""

    def write(**files):
        for name, text in {"ltm_pyro.__init__": "", **files}.items():
            path = (tmp_path / name.replace(".", "/")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return import_map({path: ast.parse(path.read_text()) for path in sorted(tmp_path.rglob("*.py"))}, tmp_path)

    return write


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("ltm_pyro.nn.layers", "from ltm_pyro.inference.elbo import Draws", "nn.layers:1 imports ltm_pyro.inference"),
        ("ltm_pyro.data.pack", "def f():\n    import ltm_pyro.runs.load", "data.pack:2 imports ltm_pyro.runs.load"),
        ("ltm_pyro.errors", "from ltm_pyro import UsageError", "errors:1 imports ltm_pyro"),
        ("models.sparse", "from ltm_pyro.guides.point import Point", "models.sparse:1 imports ltm_pyro.guides.point"),
        ("guides.flow", "def f():\n    from ltm_pyro.data import pack", "guides.flow:2 imports ltm_pyro.data.pack"),
        ("studies.scaling", "from ltm_pyro.cli import main", "studies.scaling:1 imports ltm_pyro.cli.main"),
        ("ltm_pyro.runs.run", "if TYPE_CHECKING:\n    from ltm_pyro.text import score", "runs.run:2 imports"),
    ],
)
def test_a_planted_import_upwards_is_found(plant, file, text, found):
    house = dict.fromkeys(["ltm_pyro.inference.elbo", "ltm_pyro.runs.load", "guides.point", "ltm_pyro.data.pack"], "")
    house |= dict.fromkeys(["ltm_pyro.cli.main", "ltm_pyro.text.score"], "")
    assert upward(plant(**house)) == []
    (told,) = upward(plant(**house | {file: text}))
    assert found in told


def test_a_planted_circle_of_files_is_found(plant):
    a, b, c = "ltm_pyro.nn.a", "ltm_pyro.nn.b", "ltm_pyro.nn.c"
    texts = {a: "from ltm_pyro.nn.b import x", b: "import ltm_pyro.nn.c", c: "def f():\n    from ltm_pyro.nn import a"}
    assert not circle_of_files(plant(**texts))
    for back in ("from ltm_pyro.nn import a", "try:\n    from ltm_pyro.nn import a\nfinally:\n    0"):
        assert set(circle_of_files(plant(**texts | {c: back}))) == {a, b, c}


def test_a_planted_circle_of_folders_is_found(plant):
    house = dict.fromkeys(["ltm_pyro.nn.d", "ltm_pyro.text.b", "ltm_pyro.text.c"], "")
    house["ltm_pyro.nn.a"] = "import ltm_pyro.text.b"
    assert not circle_of_folders(plant(**house))
    for back in ("import ltm_pyro.nn.d", "def f():\n    import ltm_pyro.nn.d"):
        house["ltm_pyro.text.c"] = back
        assert not circle_of_files(plant(**house))
        assert set(circle_of_folders(plant(**house))) == {"ltm_pyro.nn", "ltm_pyro.text"}


def test_a_planted_circle_with_a_folder_inside_is_found(plant):
    texts = {"studies.run": "import ltm_pyro.studies.bench.a", "studies.bench.a": "import ltm_pyro.studies.settings"}
    house = texts | {"studies.settings": ""}
    assert not circle_of_folders(plant(**house))
    house["studies.settings"] = "def f():\n    import ltm_pyro.studies.bench.a"
    assert set(circle_of_folders(plant(**house))) == {"ltm_pyro.studies.settings", "ltm_pyro.studies.bench"}


def test_a_planted_entry_is_counted(tmp_path):
    for name in ("__init__.py", "py.typed", "errors.py"):
        (tmp_path / name).touch()
    (tmp_path / "nn").mkdir()
    assert entries(tmp_path) == ["errors.py", "nn"]


def test_no_bare_import_of_a_room():
    """``import models`` works from the repository root, and loads a second copy of every class."""
    trees = FILES | {path: ast.parse(path.read_text()) for path in OUTSIDE}
    bare = [
        f"{where(path, line)} imports {name}"
        for path, tree in trees.items()
        for line, name, _ in imports(tree)
        if name.split(".")[0] in {"models", "guides", "studies", ""}
    ]
    assert not bare


def test_no_test_imports_from_a_test():
    borrowed = [
        f"{where(path, line)} imports {name}"
        for path in OUTSIDE
        for line, name, _ in imports(ast.parse(path.read_text()))
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert not borrowed


def test_every_module_loads_once():
    for path in (path for path in FILES if path.name not in ("__main__.py", "lm_eval.py")):
        importlib.import_module(module_name(path.relative_to(ROOT)))
    assert not {"models", "guides", "studies"} & set(sys.modules)


@pytest.mark.parametrize("outsider", DOORS)
def test_every_outsider_has_one_door(outsider):
    pattern, most = DOORS[outsider]
    knowing = {path for path, tree in FILES.items() for _, name, _ in imports(tree) if name.split(".")[0] == outsider}
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
        for line, name, _ in imports(tree)
        if name in {"pyro.sample", "pyro.primitives.sample"}
    ]
    assert not [place for place in sampling if not place.startswith(("models/", "guides/"))]


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    assert {module_name(folder) for folder in folders} == set(settings["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in [*FILES, *OUTSIDE]}
    assert not {name: count for name, count in lines.items() if count > 500}


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
