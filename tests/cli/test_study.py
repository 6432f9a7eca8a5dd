"""`ltm study` from a user's side: a search, what it shows, a recipe that runs, and one sentence for what is wrong."""

import json
import shutil

import pytest
import yaml

from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.storage import open_storage

SPACE = """
'''Which fast rate?'''
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.05, 0.5, log=True)}
"""
SMALL = ("--budget", "2e8flops", "--limit", 4, "--samples", 2)


FULL_ONCE = f"""{SPACE}
from pathlib import Path
from ltm_pyro.studies.search import train_and_score

def objective(setting):
    mark = Path(setting.run).parent / "was full"
    if setting.run.name == "trial-0001" and not mark.exists():
        mark.touch()
        raise OSError(28, "No space left on device")
    return train_and_score(setting)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def search(tmp_path):
    """A study's file."""
    path = tmp_path / "rate.py"
    path.write_text(SPACE)
    return path


def test_a_full_disk_ends_a_search_and_costs_no_trial(ltm, recipe, tmp_path):
    (tmp_path / "rate.py").write_text(FULL_ONCE)
    base = ("study", "run", "rate.py", "--base-config", recipe, *SMALL, "--repeats", 0, "--trials", 2)
    code, out, err = ltm(*base, "--json")
    assert (code, out) == (2, ""), err
    said = "ltm study run: The disk under runs/studies/rate is full: make room, and give the same command again."
    assert err.splitlines()[-1] == said
    code, out, err = ltm(*base, "--json")
    assert code == 0, err
    assert [row["state"] for row in json.loads(out)["trials"]] == ["complete"] * 3


def test_a_search_is_shown_and_its_best_is_a_recipe(ltm, recipe, search, tmp_path):
    base = ("study", "run", search, "--base-config", recipe, *SMALL, "--repeats", 1)
    code, out, err = ltm(*base, "--trials", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["role"] for row in found["trials"]] == ["trial", "trial", "baseline", "repeat"]
    assert all(row["state"] == "complete" for row in found["trials"])
    assert "trial 1: bound" in err
    best = found["trials"][found["best"]]
    assert found["trials"][2]["figures"]["predictive_gain"] == pytest.approx(0, abs=1e-5)
    assert not list(tmp_path.rglob("*.ckpt"))

    code, out, _ = ltm("study", "list", "--json")
    assert json.loads(out)[0] | {"best": 0} == {
        **{"study": "rate", "trials": 2, "complete": 2, "fail": 0, "pruned": 0, "best": 0, "budget": "2e8flops"}
    }
    assert "rate" in ltm("study", "list")[1]
    assert "Which fast rate?" in ltm("study", "show")[1]

    code, out, _ = ltm("study", "best", "--json")
    written = json.loads(out)
    assert written["number"] == best["number"]
    content = yaml.safe_load((tmp_path / written["recipe"]).read_text())
    assert content["model"]["inference"]["rate"] == best["parameters"]["model.inference.rate"]
    assert content["model"]["max_flops"] == 2e8
    assert ltm("study", "best")[0] == 2
    assert "Cannot write rate.py/x.yaml: " in ltm("study", "best", "--out", "rate.py/x.yaml")[2]
    assert ltm("study", "best", "--force", "--trial", 0)[0] == 0
    code, _, err = ltm("fit", "--config", "rate-best.yaml", "--trainer.limit_val_batches", 0)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "no study 'nowhere': choose from rate_ratio"),
        (("missing.py",), "no study file at missing.py"),
        (("broken.py",), "cannot be run: SyntaxError"),
        (("empty.py",), "defines no `space`"),
        (("odd.py",), "model.inference.speed"),
        (("rate.py", "--set", "model.no=1"), "model.no"),
        (("rate.py", "--set", "model.no"), "not NAME=VALUE"),
        (("rate.py", "--set", "model.no=["), "--set model.no needs a value in YAML, got '['"),
        (("rate.py", "--set", "model.guide=ltm_pyro.guides.Point"), "`bound`, because Point has no density"),
        (
            ("rate.py", "--set", "model.prior=ltm_pyro.models.EnergyPrior", "--prune", "--minimise", "prior"),
            "`bound`, because the prior's normaliser is unknown: choose another",
        ),
        (("rate.py", "--set", "data.directory=nowhere"), "no packed data at nowhere"),
        (("rate.py", "--at-most", "k_hat=low"), "needs a number, got 'low'"),
        (("rate.py", "--at-most", "peak_memory=9"), "No trial records a figure 'peak_memory': choose from bound, "),
        (("rate.py", "--minimise", "bound,bond"), "No trial records a figure 'bond': choose from bound, "),
        (("rate.py", "--minimise", ""), "No trial records a figure ''"),
        (("rate.py", "--seed", "4294967296"), "argument --seed: '4294967296' is more than 4294967295, the largest"),
        (("rate.py", "--set", "trainer.accumulate_grad_batches=20", "--budget", "2e8flops"), "less than one step"),
        (("rate.py", "--at-most", "k_hat=nan"), "--at-most needs a number, got 'nan'"),
        (("rate.py", "--memory", "nan"), "argument --memory: 'nan' is not a number above 0"),
        (("rate.py", "--memory", "-1"), "argument --memory: '-1' is not a number above 0"),
        (("rate.py", "--set", "model.inference={rate: 1}"), "--set model.inference.rate would change nothing"),
        (("rate.py", "--set", "trainer.max_steps=9"), "`trainer.max_steps` in every trial: leave it out, and see --b"),
        (("rate.py", "--set", "seed_everything=9"), "--set seed_everything would change nothing"),
        (("inference_steps", "--set", "model.decoder.width=9"), "`model.decoder.init_args.width` in every trial: le"),
        (("scaling", "--budget", "1e9flops"), "The points of scaling say what they spend: leave --budget out."),
        (("failing.py",), "fails at {'model.inference.rate': 0.05}: ValueError: odd; fix it."),
        (("rate.py", "--budget", "5"), "not an amount of training"),
        (("rate.py", "--budget", "10flops"), "less than one step"),
        (("rate.py", "--trials", "0"), "not a whole number of at least 1"),
        (("rate.py", "--prune", "--minimise", "bound,flops"), "Pruning needs one objective"),
        (("rate.py", "--storage", "nonsense"), "cannot be used"),
        (("rate.py", "--storage", "sqlite://"), "The storage sqlite:// is in memory, where no trial would be kept"),
        (
            ("rate.py", "--storage", "sqlite:///rate.py/s.db"),
            "because rate.py is no folder or is read-only: choose another --storage",
        ),
        (("rate.py", "--storage", "sqlite:///rate.py", "--out", "."), "does not answer"),
        (("rate.py", "--out", "rate.py"), "rate.py cannot be written, because rate.py is no folder or is read-only"),
        (("rate.py", "--study-name", "a:checks"), "'a:checks' would be the checks of another study"),
        (("rate.py", "--storage", "oracles://there"), "cannot be used"),
        (("rate.py", "--storage", "postgresql://nobody@127.0.0.1:1/none"), "does not answer"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(refused, recipe, search, tmp_path, arguments, said):
    (tmp_path / "broken.py").write_text("space = {")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "failing.py").write_text(f"{SPACE}def settings(parameters):\n    raise ValueError('odd')\n")
    (tmp_path / "odd.py").write_text(SPACE.replace("rate", "speed"))
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(
        "study", "run", *arguments, "--base-config", recipe, *SMALL[: 2 * ("--budget" not in arguments)]
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_study_goes_on_over_its_own_data_only_and_from_an_address(ltm, refused, recipe, search, packed, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(packed, pack)
    run = ("study", "run", search, "--base-config", recipe, *SMALL, "--trials", 1, "--repeats", 0, "--prune")
    run = (*run, "--set", f"data.directory=file://{pack}")
    code, out, err = ltm(*run, "--json")
    assert code == 0, err
    assert json.loads(out)["trials"][0]["state"] == "complete", out
    manifest = pack / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dropped": 0', '"dropped": 1'))
    assert "'rate' has another pack (" in refused(*run)


@pytest.mark.parametrize("command", ["list", "show", "best"])
def test_a_storage_that_is_not_there_is_not_made(refused, tmp_path, command):
    assert "no storage at runs/studies.db" in refused("study", command)
    assert not list(tmp_path.iterdir())


def test_a_name_with_another_plan_and_a_name_that_is_not_there(refused, tmp_path, recipe, search):
    from ltm_pyro.studies.search.plan import Plan

    url = f"sqlite:///{tmp_path / 's.db'}"
    with open_storage(url) as storage:
        plan = Plan(study="rate", question="?", space={}, recipe="", budget="1s", at_most={})
        trials.open_study(storage, "rate", plan)
        trials.open_study(storage, "rate" + trials.CHECKS, plan)
    run = ("study", "run", search, "--base-config", recipe, "--storage", url, *SMALL)
    assert "'rate' has another" in refused(*run)
    assert "choose another --study-name" in refused(*run)
    assert "no study 'other' in" in refused("study", "show", "--storage", url, "--study-name", "other")
    assert "No trial of 'rate' is complete" in refused("study", "best", "--storage", url)
    with open_storage(url) as storage:
        study = trials.load_study(storage, "rate")
        study.set_user_attr(trials.SOURCE, str(search))
        trials.enqueue(study, [{}])
        trial = trials.claim(study, lambda: trials.current_trials(study), seed=0)
        trial.set_user_attr(trials.SETTINGS, {})
        trial.set_user_attr(trials.SEED, 0)
        trials.finish(study, trial, {"bound": 1.0})
    assert "Cannot write rate.py: " in refused("study", "report", "--storage", url, "--out", "rate.py", "--force")


def test_the_written_recipe_trains_the_trial_again(ltm, recipe, search, tmp_path):
    search.write_text(SPACE + 'points = [{"model.inference.rate": 0.3}] * 2\nchecks = False\n')
    code, out, err = ltm("study", "run", search, "--base-config", recipe, *SMALL, "--json")
    assert code == 0, err
    first, second = (row["figures"]["bound"] for row in json.loads(out)["trials"])
    assert first != second  # another seed
    assert ltm("study", "best", "--trial", 1)[0] == 0
    assert ltm("fit", "--config", "rate-best.yaml", "--trainer.limit_val_batches", 0)[0] == 0
    code, out, err = ltm("evaluate", "runs/rate-best", *SMALL[2:], "--estimators", "bound", "--json")
    assert code == 0, err
    assert json.loads(out)["estimates"]["bound"]["nats_per_token"] == pytest.approx(second, abs=1e-6)


def test_a_study_in_which_nothing_is_complete_says_so_to_scripts(ltm, recipe, search):
    with search.open("a") as file:
        file.write("def objective(setting):\n    raise ValueError('odd')\n")
    code, out, _ = ltm("study", "run", search, "--base-config", recipe, *SMALL, "--trials", 1, "--json")
    found = json.loads(out)
    assert (code, found["best"], [row["state"] for row in found["trials"]]) == (2, None, ["fail"])
    assert "odd" in found["trials"][0]["reason"]
