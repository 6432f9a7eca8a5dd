"""Names that were replaced before the first release do not come back: one table, looked for wherever code is read."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
APART = {  # files that name old keys in order to refuse them
    ROOT / "ltm_pyro" / "training" / "old_recipe_keys.py",
}
RENAMED = {  # old -> new; CHANGELOG.md has the same for users
    "fit": "infer_local",
    "learn": "training_loss",
    "begin": "init, init_cache",
    "Start": "Init",
    "start": "init",
    "think": "sample_prior, sample",
    "think_again": "resample",
    "Mind": "ThoughtSampler",
    "Thinking": "ThoughtSampling",
    "thinking": "thought_sampling",
    "listening": "use_thoughts",
    "hear": "attend",
    "heard": "thoughts, mask_layers",
    "hearing": "thought_layers",
    "quiet": "no_param_store",
    "quiet_thoughts": "zero_init_cross_attention",
    "climbs": "uses_fast_steps",
    "settle": "finalize",
    "gradients": "finalize_cost",
    "natural": "natural_gradient",
    "Turn": "RotaryAngles",
    "turns": "rotary_angles",
    "remember": "project_kv",
    "ThoughtMemory": "ThoughtKV",
    "read": "decode_step",
    "Reading": "CacheSlots",
    "compiled_reading": "the argument that compiles decode_step",
    "PROTOCOLS": "ESTIMATORS",
    "protocol": "estimator",
    "protocols": "estimators, estimates",
    "check_protocols": "check_estimators",
    "charge": "estimate",
    "Totals": "NatsAndKL",
    "pose": "fit_problem",
    "Shared": "GlobalLatent",
    "held": "fix_global_draws",
    "ours": "flops_per_token",
    "published": "flops_per_token_as_published",
    "twin": "ar_baseline",
    "sound_B": "is_finite_B",
    "_unsound": "_handle_nonfinite",
    "_nothing": "_zero_loss",
    "_agree": "_sync_ranks",
    "onlookers": "callbacks",
    "beside": "temp_path",
    "Material": "ReportInputs",
    "_Book": "_ResultsFile",
    "_Page": "_TokenBuffer",
    "AverageGradient": "TrajectoryGradient",
    "Learned": "TrainingLoss",
    "infer": "draw_posterior",
    "infer_batch": "draw_batch_posterior",
}
DEFINED = {"definition", "import", "attribute"}
ONLY_AS = {  # English words, and names of others' functions: the kinds of place where the word would be ours
    "fit": {"import", "public"},  # trainer.fit, the stage "fit" and the command `ltm fit` stay
    "learn": DEFINED,
    "begin": DEFINED,
    "start": {"option", "our keyword", "our attribute", "recipe key"},  # range.start, enumerate(start=1)
    "thinking": DEFINED | {"argument", "keyword"},  # `thinking_gain` stays: what inference is worth
    "heard": DEFINED | {"argument", "keyword"},
    "gradients": {"method"},
    "natural": {"method"},  # the optimizer "natural" stays
    "Reading": {"name", *DEFINED},  # a section of a report is called so
    "read": {"method of a model"},  # as Decoder.read was; files are read everywhere
    "held": DEFINED,
    "infer": DEFINED,
    "ours": DEFINED,
    "published": DEFINED,
    "beside": DEFINED | {"argument", "keyword"},
}


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


def old_names(uses: Iterator[Use]) -> list[str]:
    """The uses of a renamed word, each with its new name."""
    return [
        f"{use.place}: {use.word} ({use.kind}) is now {RENAMED[use.word]}"
        for use in uses
        if use.word in RENAMED and use.kind in ONLY_AS.get(use.word, {use.kind})
    ]


def files() -> list[Path]:
    code = [path for room in ("ltm_pyro", "models", "guides", "studies") for path in (ROOT / room).rglob("*.py")]
    code += [path for room in ("benchmarks", "examples") for path in (ROOT / room).rglob("*.py")]
    templates = [*(ROOT / "ltm_pyro" / "cli" / "templates").glob("*.txt")]
    recipes = [*(ROOT / "studies" / "recipes").glob("*.yaml"), *(ROOT / "examples").rglob("*.sh")]
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    documents += (ROOT / "docs").rglob("*.ipynb")
    return sorted({*code, *templates, *recipes, *documents} - APART)


def test_no_old_name_is_used():
    assert not [told for path in files() for told in old_names(uses_of(path))]


def dotted_names(path: Path) -> Iterator[tuple[str, str]]:
    """Every ltm_pyro.a.b of a file, with its place: what code imports, and what prose, recipes and strings name."""
    text, place = path.read_text(), str(path.relative_to(ROOT))
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    for module, names in re.findall(r"from (ltm_pyro[\w.]*) import (\([^)]*\)|.*)", text):
        yield from ((f"{module}.{name}", place) for name in re.findall(r"(\w+)(?: as \w+)?", names.split("#")[0]))
    yield from ((name, place) for name in re.findall(r"(?<![\w./-])ltm_pyro(?:\.\w+)+", text))


def is_there(name: str) -> bool:
    """Whether a dotted name leads to a module, or to something in one."""
    module, attributes = name, []
    while not _is_module(module):  # ltm_pyro itself is one
        module, _, last = module.rpartition(".")
        attributes.insert(0, last)
    found = importlib.import_module(module) if attributes else None
    for attribute in attributes:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what is before the last dot is no package
        return False


def test_every_dotted_name_leads_somewhere():
    places: dict[str, set[str]] = {}
    for path in files():
        for name, place in dotted_names(path):
            places.setdefault(name, set()).add(place)
    assert len(places) > 100
    assert not {name: where for name, where in places.items() if not is_there(name)}


def test_every_file_that_the_documents_name_is_there():
    named = re.compile(r"(?<![\w./-])(?:ltm_pyro|models|guides|studies|tests|benchmarks|examples|docs)/[\w./-]*\w")
    documents = [path for path in files() if path.suffix in (".md", ".ipynb")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in documents
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists() and not (path.parent / name).exists()
    }
    assert not missing


@pytest.mark.parametrize(
    "code",
    [
        "from ltm_pyro.inference.local import fit",
        "__all__ = ['fit', 'Batch']",
        "class Model:\n    def think(self): ...",
        "model.think(3)",
        "LocalInference(start=Init())",
        "inference.start.jitter",
        "class Guide:\n    def gradients(self, steps): ...",
        "guide.natural(local, found)",
        "decoder.listening = False",
        "def score(*, protocol): ...",
        "class Scoring:\n    protocol: str = 'bound'",
        "score(run, texts, protocols=['bound'])",
        "found['protocols']",
        "{'quiet_thoughts': True}",
        "parser.add_argument('--protocols')",
        "words = ['--model.decoder.init_args.quiet_thoughts', 'true']",
        "with held(model): ...\ndef held(model): ...",
    ],
)
def test_a_planted_old_name_is_found(code):
    assert old_names(uses_in_code(code, "models/new.py"))


@pytest.mark.parametrize(
    "code",
    [
        "trainer.fit(module)",
        "COMMANDS = {'fit': 1}",
        "range(3).start, enumerate(x, start=1)",
        "optimizer = 'natural'",
        "ours, published, held = 1, 2, 3",
        "gradients = torch.autograd.grad(loss, leaves)",
        "class Model(Protocol): ...",
        "path.read_text(), file.read()",
        "'it may think, hear and settle'",
    ],
)
def test_an_english_word_is_no_old_name(code):
    assert not old_names(uses_in_code(code, "models/new.py"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("```yaml\nmodel:\n  inference: {start: {jitter: 0.1}}\n```", "start"),
        ("```\nltm evaluate RUN --protocols bound\n```", "protocols"),
        ("```python\nfrom ltm_pyro import fit\n```", "fit"),
        ("The protocol `fit` may think.", None),
    ],
)
def test_a_planted_old_name_in_a_document_is_found(text, word):
    found = old_names(uses_in_markdown(text, "docs/new.md"))
    assert len(found) == bool(word)
    assert not word or f": {word} (" in found[0]


def test_a_planted_name_that_leads_nowhere_is_found():
    assert is_there("ltm_pyro.models.Decoder")
    assert is_there("ltm_pyro.inference.local.infer_local")
    assert not is_there("ltm_pyro.attention")
    assert not is_there("ltm_pyro.inference.local.fit")
