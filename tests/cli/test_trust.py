"""Code of the user's own: remembered while it is unchanged, registered, or trusted; anybody else's is asked about."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ltm_pyro import load_run, register_class
from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search.definition import load_definition
from ltm_pyro.training import trust
from ltm_pyro.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
NOT_OURS = "names code that is not ltm_pyro's"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A data folder of its own, nothing registered, and no module of the user's left behind."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(trust, "_own", {})
    monkeypatch.setattr(trust, "_registered", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("spike", "helper_of_spike"):
        sys.modules.pop(name, None)


@pytest.fixture
def new_process(monkeypatch):
    """Forgets what this process knows, as the next one does."""

    def forget():
        trust._own.clear()
        for name in ("spike", "helper_of_spike"):
            sys.modules.pop(name, None)

    return forget


@pytest.fixture
def trained(recipe, ltm, tmp_path, monkeypatch):
    """A run with a prior of the user's own, which imports a file beside it; training is the user's own command."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "examples" / "my_prior.py").read_text()
    Path("mine").mkdir()
    Path("mine/spike.py").write_text(f"{text}\nimport helper_of_spike\n")
    Path("mine/helper_of_spike.py").write_text("x = 1\n")
    code, _, err = ltm("fit", "--config", recipe, "--run", "run", *QUICK, "--model.prior", "mine/spike.py:SpikeAndSlab")
    assert code == 0, err
    return tmp_path / "run"


def test_the_users_own_run_is_loaded_while_its_files_are_unchanged(trained, ltm, refused, new_process, tmp_path):
    text = ("--limit", 2, "--samples", 1)  # its own data too, by an absolute path
    new_process()
    assert ltm("evaluate", trained, *text)[0] == 0
    for file in ("spike", "helper_of_spike"):
        path = tmp_path / "mine" / f"{file}.py"
        before = path.read_text()
        path.write_text(f"{before}# changed\n")
        new_process()
        assert NOT_OURS in refused("evaluate", trained, *text)
        path.write_text(before)
    new_process()
    assert ltm("evaluate", trained, *text)[0] == 0
    config = trained / "config.yaml"
    assert ltm("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", 2)[0] == 0
    new_process()
    shutil.move(tmp_path / "mine" / "spike.py", tmp_path / "spike.py")  # a copy in the current folder is another file
    assert NOT_OURS in refused("generate", trained)


def test_another_user_is_asked_and_shown_what_is_executed(trained, ltm, refused, new_process, tmp_path, monkeypatch):
    new_process()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another"))
    (tmp_path / "text.txt").write_text("every small model reads")
    out = ("--out", tmp_path / "q.nc", "--longer", "cut", "--samples", 25)
    commands = (
        ("evaluate", trained, "--limit", 2, "--samples", 1),
        ("generate", trained, "--max-new-tokens", 2),
        ("posterior", trained, "--input", tmp_path / "text.txt", *out),
        ("calibrate", trained, "--simulations", 20, "--samples", 9),
        ("show", trained, "--svg", tmp_path / "run.svg"),
        ("flops", "--config", trained / "config.yaml"),
        ("export", trained, "--out", tmp_path / "export"),
        ("report", tmp_path / "q.nc", "--run", trained, "--out", tmp_path / "report.html"),
        ("fit", "--config", trained / "config.yaml", "--run", tmp_path / "again"),
    )
    file = tmp_path / "mine" / "spike.py"
    shown = f"{file}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}, unchanged since training"
    for command in commands:
        assert NOT_OURS in refused(*command) if command[0] != "report" else True
        code, _, err = ltm(*command, "--trust")
        assert code == 0, err
        assert shown in err, command
    with pytest.raises(UsageError, match=r"or ltm_pyro\.register_class"):
        load_run(trained)
    assert type(load_run(trained, trust=True).model.prior).__name__ == "SpikeAndSlab"
    assert NOT_OURS in refused("compare", "--config", trained / "config.yaml", "--out", tmp_path / "compare")
    study = ("study", "run", "rate_ratio", "--base-config", trained / "config.yaml", "--out", tmp_path / "study")
    assert NOT_OURS in refused(*study)
    code, _, err = ltm(*study, "--trust", "--minimise", "nothing")  # which is looked at after the recipe
    assert (code, "Trusted:" in err, "No trial records a figure 'nothing'" in err) == (2, True, True)


def test_the_code_travels_with_run_and_export_and_is_executed_only_if_trusted(
    trained, ltm, refused, new_process, tmp_path, monkeypatch
):
    text = (tmp_path / "mine" / "spike.py").read_bytes()
    assert ltm("export", trained, "--out", tmp_path / "export")[0] == 0
    for place in (trained, tmp_path / "export"):
        assert {file.name for file in (place / "code").iterdir()} == {"spike.py", "helper_of_spike.py"}
        assert (place / "code" / "spike.py").read_bytes() == text
    figures = {}
    for place in ("run", "export"):  # on another machine, without the files
        moved = tmp_path / "there" / place
        shutil.copytree(tmp_path / place, moved)
        figures[place] = ltm("show", tmp_path / place)[1].replace(str(tmp_path / place), "")
    shutil.rmtree(tmp_path / "mine")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another"))
    for place in ("run", "export", "run/checkpoints/last.ckpt"):
        moved = tmp_path / "there" / place
        new_process()
        assert NOT_OURS in refused("generate", moved)
        assert "spike" not in sys.modules
        code, _, err = ltm("generate", moved, "--max-new-tokens", 1, "--trust")
        assert code == 0, err
        assert f"/there/{place.partition('/')[0]}/code/spike.py, SHA-256" in err
        assert "unchanged since training" in err
    (tmp_path / "there" / "run" / "code" / "spike.py").write_bytes(text + b"# changed\n")
    new_process()
    assert "CHANGED since training" in ltm("generate", tmp_path / "there" / "run", "--trust")[2]
    monkeypatch.chdir(tmp_path / "there")
    new_process()
    shutil.rmtree(tmp_path / "there" / "run" / "code")
    assert "is missing: put it back" in refused("generate", tmp_path / "there" / "run", "--trust")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.directory={class_path: evil.py:Prior}", "which is YAML and not a name"),
        ("run={class_path: evil.py:Prior}", "which is YAML and not a name"),
        ("trainer=./inner.yaml", "no section"),
        ("model.inference=./inner.yaml", "no section"),
        ("model.keep_local=./inner.yaml", "is not read from several files"),
        ("model.prior=evil.py:Prior", NOT_OURS),
    ],
)
def test_options_out_of_a_database_are_plain(recipe, tmp_path, monkeypatch, option, message):
    """As `ltm study best` takes them from a storage: what they name is neither imported nor opened."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('imported')")
    Path("inner.yaml").write_text("class_path: evil.py:Prior")
    assert read_recipe(["--config", str(recipe), "--run", "mine"], own=False).run.endswith("mine")
    with pytest.raises(UsageError, match=message):
        read_recipe(["--config", str(recipe), f"--{option}"], own=False)


def test_a_registered_class_is_built_and_its_file_is_not_imported(trained, new_process, tmp_path, monkeypatch):
    sys.path.append(str(tmp_path / "mine"))
    new_process()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another"))
    import spike

    assert register_class(spike.SpikeAndSlab) is spike.SpikeAndSlab
    (tmp_path / "mine" / "spike.py").write_text("raise SystemExit('imported')")
    assert type(load_run(trained).model.prior) is spike.SpikeAndSlab
    with pytest.raises(UsageError, match="is not a class"):
        register_class(print)


def test_data_outside_are_read_for_their_owner_alone(run, ltm, refused, new_process, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--limit", 2, "--samples", 1)
    assert "are outside the current folder and are not read unasked" in refused("evaluate", run, *options)
    for asked in (("--data", packed), ("--trust",)):
        assert ltm("evaluate", run, *options, *asked)[0] == 0
    monkeypatch.chdir(packed.parent)
    assert ltm("evaluate", run, *options)[0] == 0


def test_the_store_is_the_users_and_a_line_that_was_cut_is_left_out(trained, ltm, new_process, tmp_path):
    store = tmp_path / "data" / "ltm_pyro" / "trusted.jsonl"
    assert store.stat().st_mode & 0o077 == 0
    assert [*json.loads(store.read_text())] == ["digest", "files"]
    store.write_text('{"digest": "cut\n[1]\n' + store.read_text())
    new_process()
    assert ltm("generate", trained, "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"prior": "a.B"}, ["a.B"]),
        ({"prior": "B"}, ["B"]),
        ({"x": "B", "y": 1.5, "z": [True, None, "1.5e3"]}, []),
        ({"class_path": "a.B", "init_args": {"x": {"class_path": "c.D"}}}, ["a.B", "c.D"]),
        ({"x": ["y", "folder/file.py:Name"]}, ["folder/file.py:Name"]),
        ({"x": "{class_path: a.B}"}, ["a.B"]),
        ({"x": "'{class_path: a.B}'"}, ["a.B"]),
        ({"callbacks": ["Timer"], "precision": "bf16-mixed", "max_time": "00:00:01:00"}, ["Timer"]),
    ],
)
def test_names_of_code_are_found_wherever_they_stand(content, names):
    assert [*trust.code_names(content)] == names


def test_a_function_is_no_part_of_a_model_and_a_recipe_of_ones_own_is_free(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spike.py").write_text(
        (ROOT / "examples" / "my_prior.py").read_text() + "\ndef make(shape: ThoughtShape) -> PyroModule: ...\n"
    )
    words = ["--config", str(recipe), "--model.prior"]
    with pytest.raises(UsageError, match="which is no class: name a class"):
        read_recipe([*words, "spike.py:make"])
    own = tmp_path / "own.yaml"
    content = yaml.safe_load(recipe.read_text())
    content["model"]["prior"] = "spike.SpikeAndSlab"
    own.write_text(yaml.safe_dump(content))
    assert read_recipe(["--config", str(own)]).model.prior.class_path == "spike.SpikeAndSlab"
    (tmp_path / "checkpoints").mkdir()  # now it lies with a run, which may come from anybody
    for place in (own, tmp_path / "elsewhere" / "link.yaml"):
        place.parent.mkdir(exist_ok=True)
        place.exists() or place.symlink_to(own)
        with pytest.raises(UsageError, match=NOT_OURS):
            read_recipe([f"--config={place}"])
    with pytest.raises(UsageError, match=NOT_OURS):
        read_recipe([*words, "spike.SpikeAndSlab"], own=False)


def test_a_point_of_a_storage_has_to_be_in_the_studys_space(tmp_path):
    (tmp_path / "study.py").write_text(
        "from optuna.distributions import *\n"
        "space = {'model.prior': CategoricalDistribution(['a', 'b']), 'rate': FloatDistribution(0.1, 1.0)}\n"
    )
    definition = load_definition(str(tmp_path / "study.py"))
    assert {*map(type, definition.space.values())} == {CategoricalDistribution, FloatDistribution}
    assert definition.has({"model.prior": "a", "rate": 0.5})
    for point in ({"model.prior": "os.system"}, {"rate": 2.0}, {"rate": "os.system"}, {"other": 1}):
        assert not definition.has(point)
