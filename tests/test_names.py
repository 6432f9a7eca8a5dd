"""Names that were replaced before the first release do not come back, and every name that code reads is there."""

import builtins
import importlib.util
import json
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltm_pyro.training.old_recipe_keys import RENAMED as RENAMED_KEYS
from tests.words import ROOT, Use, uses_in_code, uses_in_markdown, uses_of

APART = {  # files that name old keys in order to refuse them
    ROOT / "ltm_pyro" / "training" / "old_recipe_keys.py",
    ROOT / "ltm_pyro" / "cli" / "old_options.py",
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
    "thinking_gain": "predictive_gain",
    "loo_by_token": "loo_by_factor",
    "narrow_rows": "differences",
    "loo_by_sequence": "evidence_records",
}
DEFINED = {"definition", "import", "attribute"}
ONLY_AS = {  # English words, and names of others' functions: the kinds of place where the word would be ours
    "fit": {"import", "public"},  # trainer.fit, the stage "fit" and the command `ltm fit` stay
    "learn": DEFINED,
    "begin": DEFINED,
    "start": {"option", "our keyword", "our attribute", "recipe key"},  # range.start, enumerate(start=1)
    "thinking": DEFINED | {"argument", "keyword"},
    "heard": DEFINED | {"argument", "keyword"},
    "gradients": {"method"},
    "natural": {"method"},  # the optimizer "natural" stays
    "Reading": {"name", *DEFINED},  # a section of a report is called so
    "read": {"method of a model"},  # as Decoder.read was; files are read everywhere
    "held": DEFINED,
    "infer": DEFINED,
    "ours": {"definition", "import"},  # a benchmark has an option of this name
    "published": {"definition", "import"},
    "beside": DEFINED | {"argument", "keyword"},
}


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


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_no_old_recipe_key_is_written(old):
    """In code, recipes and documents alike, as ``model.inference.start`` or with ``init_args`` in between."""
    pattern = re.compile(rf"{re.escape(old).replace(re.escape('decoder.'), 'decoder(?:[.]init_args)?[.]')}\b")
    assert not [str(path.relative_to(ROOT)) for path in files() if pattern.search(path.read_text())]


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


def undefined(code: str, file: str) -> list[str]:
    """The names that a file reads as globals and nobody there defines; ruff and mypy cannot tell them from axes."""
    module = symtable.symtable(code, file, "exec")
    defined = {"__file__", "__name__", "__doc__", "__annotations__", *dir(builtins)}
    read, scopes = set(), [module]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if (scope is module or symbol.is_declared_global()) and (symbol.is_assigned() or symbol.is_imported()):
                defined.add(symbol.get_name())
            elif symbol.is_referenced() and symbol.is_global():
                read.add(symbol.get_name())
    return [f"{file}: {name}" for name in sorted(read - defined)]


def test_every_name_that_code_reads_is_defined():
    code = [*(path for path in files() if path.suffix == ".py"), *APART, *(ROOT / "tests").rglob("*.py")]
    found = [told for path in code for told in undefined(path.read_text(), str(path.relative_to(ROOT)))]
    assert found == ["tests/inference/test_check.py: undefined"]  # a guide that fails on purpose


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f(x: Float[Tensor, 'B T']): return plot(x)", ["Float", "Tensor", "plot"]),
        ("import re\nclass A(re.X):\n    b = re\n    def f(self): return [c for c in b]", ["b"]),
        ("def f():\n    global a\n    a = 1\ndef g(): return a, __file__, len", []),
        ("try: import x as y\nexcept ImportError as e: raise e\nfor i in (z := y): f = lambda k: (i, k, z)", []),
    ],
)
def test_planted_undefined_names_are_found(code, names):
    assert undefined(code, "a.py") == [f"a.py: {name}" for name in names]


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
