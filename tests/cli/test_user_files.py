"""Priors and guides in a user's own files: training, loading, `ltm new`, `ltm show` and `ltm compare`."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, GUIDE = ROOT / "examples" / "my_prior.py", ROOT / "examples" / "my_guide.py"
QUICK = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No module of a user's stays behind, and no folder on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_prior", "my_guide", "flat", "broken", "spike_and_slab2"):
        sys.modules.pop(name, None)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A user's folder outside the repository, with the example's prior in it."""
    shutil.copy(EXAMPLE, tmp_path / "my_prior.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["my_prior.SpikeAndSlab", "my_prior.py:SpikeAndSlab"])
def test_a_prior_outside_the_repository_works_everywhere(name, elsewhere, recipe, ltm, refused):
    options = ("--model.prior", name, "--model.prior.rate", 0.2)
    code, _, err = ltm("fit", "--config", recipe, "--run", "run", *QUICK, *options)
    assert code == 0, err
    text = Path("run/config.yaml").read_text()
    assert f"class_path: {elsewhere / 'my_prior.py'}:SpikeAndSlab" in text
    assert "rate: 0.2" in text
    for command in (("evaluate", "run", "--samples", 2, "--limit", 2), ("generate", "run", "--max-new-tokens", 2)):
        code, out, err = ltm(*command, "--json")
        assert code == 0, err
        assert json.loads(out)
    assert ltm("fit", "--config", "run/config.yaml", "--ckpt_path", "run", "--trainer.max_steps", 2)[0] == 0

    del sys.modules["my_prior"]
    (elsewhere / "my_prior.py").rename(elsewhere / "gone.py")
    assert f"{Path('run/code/my_prior.py').resolve()}" in refused(
        "evaluate", "run"
    )  # the copy, which is no file of ours
    Path("run/code/my_prior.py").unlink()
    message = refused("evaluate", "run")
    assert f"The file {elsewhere / 'my_prior.py'} is missing" in message


def test_a_guide_of_a_users_own_works_everywhere(recipe, ltm, tmp_path):
    run, texts = tmp_path / "run", tmp_path / "texts.txt"
    texts.write_text("every small model reads")
    for command in (
        ("fit", "--config", recipe, "--run", run, *QUICK, "--model.guide", f"{GUIDE}:LogisticGuide"),
        ("evaluate", run, "--samples", 2, "--limit", 2),
        ("generate", run, "--prompt", "every", "--max-new-tokens", 2),
        ("posterior", run, "--input", texts, "--out", tmp_path / "q.nc", "--longer", "cut", "--samples", 25),
    ):
        code, _, err = ltm(*command)
        assert code == 0, err


def test_the_guide_in_the_docs_is_the_example():
    shown = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "guides.md").read_text(), re.DOTALL | re.MULTILINE)
    assert GUIDE.read_text().endswith(shown[1])


def test_a_module_that_has_gone_is_named(recipe, refused, tmp_path):
    message = refused("fit", "--config", recipe, "--run", tmp_path / "run", "--model.prior", "gone.Prior")
    assert "gone" in message


def test_a_faulty_prior_is_refused_before_anything_is_written(elsewhere, recipe, refused):
    Path("flat.py").write_text(EXAMPLE.read_text().replace(".to_event(3))", ".to_event(3)).flatten(-2)"))
    message = refused("fit", "--config", recipe, "--run", "run", "--model.prior", "flat.py:SpikeAndSlab")
    assert f"SpikeAndSlab returns (5, 2, 32) ({elsewhere / 'flat.py'}:" in message
    assert not Path("run").exists()
    Path("broken.py").write_text("import nothing_like_it")
    assert "broken.py cannot be imported (ModuleNotFoundError" in refused(
        "fit", "--config", recipe, "--run", "run", "--model.prior", "broken.py:Prior"
    )


WRONG_NAMES = {
    **dict.fromkeys(("my-prior", "class", "1prior", "none", "", "_x", "sub/mine", "mine.py"), "no name for a file"),
    **dict.fromkeys(("json", "Torch", "ltm_pyro"), "would hide the module"),
    **dict.fromkeys(("TestMine", "conftest"), "choose another NAME"),
}


@pytest.mark.parametrize("kind", ["prior", "guide", "study"])
@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_of_which_no_module_can_be_made_is_refused(kind, name, refused, tmp_path):
    assert WRONG_NAMES[name] in refused("new", kind, name, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["prior", "guide", "study"])
def test_what_is_written_anew_keeps_the_style_whatever_it_is_called(kind, ltm, tmp_path):
    folder = tmp_path / "my models"
    for name in ("aaa", "definition", "Zz", "MyName"):
        code, out, err = ltm("new", kind, name, "--out", folder)
        assert code == 0, err
    assert f"python -m pytest '{folder}/test_my_name.py'" in out
    assert subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=folder, capture_output=True).returncode == 0
    config = ("--config", ROOT / "pyproject.toml")
    tests = ("--per-file-ignores", "test_*.py:ANN", "--per-file-ignores", "test_*.py:D")
    for words in (("check", *config, *tests), ("format", "--check", *config)):
        done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", ["prior", "guide"])
def test_what_is_written_anew_passes_its_test(kind, tmp_path, ltm, refused, recipe):
    code, out, err = ltm("new", kind, "SpikeAndSlab2", "--out", tmp_path / "my own")
    assert code == 0, err
    file, test = tmp_path / "my own" / "spike_and_slab2.py", tmp_path / "my own" / "test_spike_and_slab2.py"
    assert str(test) in out
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "exists already" in refused("new", kind, "SpikeAndSlab2", "--out", file.parent)
    assert "the new files or pytest use themselves" in refused("new", kind, "Decoder", "--out", tmp_path)
    place = (f"--model.{kind}", f"{file}:SpikeAndSlab2", f"--model.{kind}.scale", 0.5)
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "run", *QUICK, *place)[0] == 0


def test_a_study_written_anew_passes_its_test_and_runs(tmp_path, ltm, small_batches, refused, monkeypatch):
    code, out, err = ltm("new", "study", "my_sweep", "--out", tmp_path / "mine")
    assert code == 0, err
    file, test = tmp_path / "mine" / "my_sweep.py", tmp_path / "mine" / "test_my_sweep.py"
    assert f"then ltm study run {file}" in out
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    monkeypatch.chdir(tmp_path)
    options = ("--base-config", small_batches, "--budget", "6e8flops", "--trials", 1, "--repeats", 0, "--limit", 2)
    code, out, err = ltm("study", "run", file, *options, "--json")
    assert code == 0, err
    first, _ = json.loads(out)["trials"]
    assert first["parameters"] == {"rate": 0.2, "fast_steps": 4}
    assert first["figures"]["memory_gib"] > 0
    assert "exists already" in refused("new", "study", "my_sweep", "--out", tmp_path / "mine")


def test_show_prints_sites_and_draws_the_plates(run, recipe, ltm, refused, tmp_path):
    code, out, _ = ltm("show", run, "--svg", tmp_path / "run.svg")
    assert code == 0
    assert out.startswith("Latent sites of GaussianPrior: name, shape, prior\n  z  2 2 16  Normal, of each sequence\n")
    assert "z dist" in out
    assert "z_log_var  2 2 2 16" in out
    texts = [x.text for x in ET.parse(tmp_path / "run.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"z", "tokens", "sequences"} <= set(texts)
    code, out, _ = ltm("show", recipe, "--svg", tmp_path / "recipe.svg", "--json")
    assert json.loads(out)["sites"]["z"] == {"shape": [2, 2, 2, 16], "observed": False}
    sparse = tmp_path / "sparse.yaml"
    sparse.write_text(recipe.read_text().replace("\nmodel:\n", "\nmodel:\n  prior: ltm_pyro.models.SparsePrior\n"))
    latent = json.loads(ltm("show", sparse, "--svg", tmp_path / "sparse.svg", "--json")[1])["latent"]
    assert latent["z_scale"] == {"shape": [2, 2, 16], "prior": "HalfCauchy", "of_each_sequence": False}
    assert latent["z_unit"] == {"shape": [2, 2, 16], "prior": "Normal", "of_each_sequence": True}
    assert "There is no run" in refused("show", tmp_path / "nowhere")
    assert "choose another --svg" in refused("show", run, "--svg", tmp_path / "no" / "where.svg")


def test_show_replaces_no_file_but_its_own(run, ltm, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [ltm("show", run)[0] for _ in range(2)] == [0, 0]
    own = Path("run.svg").read_text()
    Path("run.svg").write_text("mine")
    assert "run.svg exists already: choose another --svg, or add --force" in refused("show", run)
    assert Path("run.svg").read_text() == "mine"
    assert ltm("show", run, "--force")[0] == 0
    assert Path("run.svg").read_text() == own


def test_compare_puts_pairs_side_by_side_and_goes_on_where_it_was(recipe, ltm, refused, tmp_path):
    noted = tmp_path / "noted.yaml"
    noted.write_text(f"# Prüfung\n{recipe.read_text()}", "utf-8")
    words = ("compare", "--config", noted, "--priors", "GaussianPrior", "--guides", "MeanField,Point")
    more = ("--minutes", 0.02, "--samples", 2, "--limit", 4, "--out", tmp_path / "out", "--json")
    code, out, err = ltm(*words, *more)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["autoregressive", "GaussianPrior-MeanField", "GaussianPrior-Point"]
    assert "# Prüfung" in (tmp_path / "out" / "compare.json").read_text("utf-8")
    thinking = rows["GaussianPrior-MeanField"]
    assert thinking["predictive_gain"] != 0
    assert rows["autoregressive"]["predictive_gain"] == pytest.approx(0, abs=1e-6)
    assert thinking["k_hat"] is not None
    assert rows["GaussianPrior-Point"]["no_bound"] == "Point has no density"

    (tmp_path / "out" / "GaussianPrior-MeanField" / "result.json").unlink()  # as after a kill: the rest is kept
    code, out, err = ltm(*words, *more)
    assert code == 0, err
    assert {row["name"]: row for row in json.loads(out)["rows"]}["GaussianPrior-Point"] == rows["GaussianPrior-Point"]
    assert "choose another --out" in refused(*words, *more[2:], "--minutes", 1)
    assert "choose another --out" in refused(*words, *more[2:], "--minutes", 0.02, "--samples", 3)
    code, out, _ = ltm(*words, *more[:-1])
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert "4 sequences, 64 tokens" in text
    assert "GaussianPrior Point" in text
    without = rows["GaussianPrior-Point"]["without_thinking"]
    assert f"no bound, because Point has no density; {without:.3f} without" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--config", "nowhere.yaml"), "There is no recipe nowhere.yaml"),
        (("--minutes", 0), "'0' is not a number above 0"),
        (("--minutes", "inf"), "'inf' is not a number above 0"),
        (("--minutes", 0.001), "--minutes is 0.001: give each pair a second at least"),
        (("--guides", "MeanField,MeanFeild"), "ltm_pyro.guides.MeanFeild"),
        (("--priors", "GaussianPrior,nowhere.py:Mine"), "The file nowhere.py is missing"),
        (("--priors", "GaussianPrior,ltm_pyro.models.GaussianPrior"), "Two pairs are called GaussianPrior-MeanField"),
        (("--option", "data.directory=nowhere"), "nowhere is not a packed corpus"),
        (("--option", "data.directory=whole", "--option", "trainer.limit_val_batches=0"), "has no split 'val'"),
        (("--option", "trainer.max_steps=3"), "--option trainer.max_steps would change nothing"),
    ],
)
def test_compare_refuses_before_it_trains(recipe, corpus, ltm, refused, elsewhere, options, said):
    words = ("--tokenizer", "bpe:280", "--seq-len", 16, "--val-fraction", 0)
    assert ltm("data", "pack", corpus, "--out", "whole", *words)[0] == 0
    before = sorted(elsewhere.rglob("*"))
    assert said in refused("compare", "--config", recipe, *options)
    assert sorted(elsewhere.rglob("*")) == before


def test_a_comparison_has_no_figure_that_json_lacks(recipe, ltm, elsewhere):
    code, out, err = ltm("compare", "--config", recipe, "--minutes", 0.08, "--samples", 2, "--limit", 1, "--json")
    assert code == 0, err
    rows = json.loads(out, parse_constant=pytest.fail)["rows"]
    assert [row["stderr"] for row in rows] == [None, None]  # one sequence has none
    assert min(row["steps"] for row in rows) > 3  # the recipe's own end: time is the only one here
