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
SMALL = ("--budget", "6e8flops", "--limit", 4, "--samples", 2)


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
def recipe(small_batches):
    """Trials have budgets, and need 50 steps each."""
    return small_batches


@pytest.fixture
def search(tmp_path):
    """A study's file."""
    path = tmp_path / "rate.py"
    path.write_text(SPACE)
    return path


@pytest.mark.slow
def test_a_disk_that_was_full_costs_no_trial(ltm, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("ltm_pyro.studies.search.runner.PAUSES", (0.1,))
    (tmp_path / "rate.py").write_text(FULL_ONCE)
    base = ("study", "run", "rate.py", "--base-config", recipe, *SMALL, "--repeats", 0, "--trials", 2)
    code, out, err = ltm(*base, "--json")
    assert code == 0, err
    assert "the disk is full: trial 1 waits again" in err
    assert [row["state"] for row in json.loads(out)["trials"]] == ["complete"] * 3


def test_a_search_is_shown_and_its_best_is_a_recipe(ltm, recipe, search, tmp_path):
    base = ("study", "run", search, "--base-config", recipe, *SMALL, "--repeats", 1)
    code, out, err = ltm(*base, "--trials", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["role"] for row in found["trials"]] == ["trial", "trial", "baseline", "repeat", "repeat"]
    assert all(row["state"] == "complete" for row in found["trials"])
    assert "trial 1: bound" in err
    best = found["trials"][found["best"]]
    assert found["trials"][2]["figures"]["predictive_gain"] == pytest.approx(0, abs=1e-5)
    assert not list(tmp_path.rglob("*.ckpt"))

    code, out, _ = ltm("study", "list", "--json")
    assert json.loads(out)[0] | {"best": 0} == {
        **{"study": "rate", "trials": 2, "complete": 2, "fail": 0, "pruned": 0, "best": 0, "budget": "6e8flops"}
    }
    assert "rate" in ltm("study", "list")[1]
    assert "Which fast rate?" in ltm("study", "show")[1]

    code, out, _ = ltm("study", "best", "--json")
    written = json.loads(out)
    assert written["number"] == best["number"]
    content = yaml.safe_load((tmp_path / written["recipe"]).read_text())
    assert content["model"]["inference"]["rate"] == best["parameters"]["model.inference.rate"]
    assert content["model"]["max_flops"] == 6e8
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
        (
            ("rate.py", "--at-most", "peak_memory=9"),
            "No trial records a figure 'peak_memory' (did you mean peak_memory_mib?): choose",
        ),
        (
            ("rate.py", "--minimise", "bound,bond"),
            "No trial records a figure 'bond' (did you mean bound?): choose from bound, ",
        ),
        (("rate.py", "--minimise", ""), "No trial records a figure ''"),
        (("rate.py", "--seed", "4294967296"), "argument --seed: '4294967296' is more than 4294967295, the largest"),
        (
            ("rate.py", "--set", "trainer.accumulate_grad_batches=20", "--budget", "6e8flops"),
            "less than 50 of the dearest",
        ),
        (("rate.py", "--at-most", "k_hat=nan"), "--at-most needs a number, got 'nan'"),
        (("rate.py", "--memory", "nan"), "argument --memory: 'nan' is not a number above 0"),
        (("rate.py", "--memory", "-1"), "argument --memory: '-1' is not a number above 0"),
        (("rate.py", "--set", "model.inference={rate: 1}"), "--set model.inference.rate would change nothing"),
        (("rate.py", "--set", "trainer.max_steps=9"), "`trainer.max_steps` in every trial: leave it out, and see --b"),
        (("rate.py", "--set", "seed_everything=9"), "--set seed_everything would change nothing"),
        (("inference_steps", "--set", "model.decoder.width=9"), "`model.decoder.init_args.width` in every trial: le"),
        (("scaling", "--budget", "6e8flops"), "The points of scaling say what they spend: leave --budget out."),
        (("failing.py",), "fails at {'model.inference.rate': 0.05}: ValueError: odd; fix it."),
        (("rate.py", "--budget", "5"), "not an amount of training"),
        (("rate.py", "--budget", "10flops"), "less than 50 of the dearest steps"),
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
        trial = trials.claim(study, lambda: trials.current_trials(study), trials.plan_of(study))
        trial.set_user_attr(trials.SETTINGS, {})
        trial.set_user_attr(trials.SEED, 0)
        trials.finish(study, trial, {"bound": 1.0}, trials.plan_of(study))
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


FREE = f"""{SPACE}
def objective(setting):
    rate = setting.parameters.get("model.inference.rate", 0.3)
    return {{"bound": rate, "kl": 1 / rate, "flops": 1e9}}
"""


def test_points_names_fronts_and_times_on_the_command_line(ltm, refused, recipe, tmp_path):
    (tmp_path / "rate.py").write_text(FREE)
    base = ("study", "run", "rate.py", "--base-config", recipe, "--budget", "6e8flops", "--repeats", 0)
    where = ("--storage", "sqlite:///s.db?timeout=60")
    more = ("--sampler", "qmc", "--timeout", "1h", "--trial-timeout", "5m", "--finalists", 2, "--pruner", "none")
    code, out, err = ltm(*base, *where, *more, "--minimise", "bound,kl", "--trials", 3, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert sorted(found["front"]) == [0, 1, 2]  # less of one is more of the other
    assert "3 trials and 1 checks are ahead" in err
    assert "front 0" in ltm("study", "show", *where)[1]

    best = ("study", "best", *where, "--out", "best.yaml", "--force", "--json")
    assert json.loads(ltm(*best, "--pick", 1)[1])["number"] == found["front"][1]
    least = min(found["trials"][:3], key=lambda row: row["figures"]["kl"])["number"]
    assert json.loads(ltm(*best, "--weight", "kl=1", "--weight", "bound=0")[1])["number"] == least
    assert "--pick is 7, and the front has 3 trials" in refused(*best, "--pick", 7)
    assert "--weight needs a number" in refused(*best, "--weight", "kl=much")

    point = ("study", "enqueue", *where, "--study-name", "rate", "--json", "--set")
    assert json.loads(ltm(*point, "model.inference.rate=0.25")[1]) == {"trial": 3}
    assert "not within 0.05 to 0.5" in refused(*point, "model.inference.rate=0.75")
    code, out, err = ltm(*base, *where, *more, "--minimise", "bound,kl", "--trials", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["trials"][3]["parameters"] == {"model.inference.rate": 0.25}

    assert json.loads(ltm("study", "rename", *where, "--study-name", "rate", "new", "--json")[1]) == {"study": "new"}
    warm = ("--warm-start", "new", "--maximise", "kl", "--trials", 2, "--json")
    code, out, err = ltm(*base, *where, *warm)
    assert code == 0, err
    assert json.loads(out)["trials"][0]["parameters"] in [row["parameters"] for row in found["trials"]] + [
        {"model.inference.rate": 0.25}
    ]
    assert "There is no study 'gone'" in refused("study", "delete", *where, "--study-name", "gone", "--json")
    assert json.loads(ltm("study", "delete", *where, "--study-name", "new", "--force", "--json")[1]) == {"deleted": 4}
    assert [row["study"] for row in json.loads(ltm("study", "list", *where, "--json")[1])] == ["rate"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--timeout", "5"), "argument --timeout: '5' is no time: write 90s, 5m or 2h"),
        (("--sampler", "tpe2"), "There is no sampler 'tpe2' (did you mean tpe?): choose from tpe, gp"),
        (("--pruner", "hyper-band"), "There is no pruner 'hyper-band' (did you mean hyperband?)"),
        (("--floor", "runs/x"), "--floor and --ceiling belong together"),
        (("--maximise", "bound", "--minimise", "bound"), "bound is an objective twice"),
        (("--maximise", "gain"), "No trial records a figure 'gain'"),
        (("--warm-start", "a/b"), "names no study's files"),
    ],
)
def test_choices_that_there_are_not_are_refused_by_name(refused, recipe, search, tmp_path, arguments, said):
    assert said in refused("study", "run", search, "--base-config", recipe, *SMALL, *arguments)


FULL_ALWAYS = FULL_ONCE.replace('== "trial-0001" and not mark.exists()', '!= "trial-0000"')


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_a_search_and_costs_no_trial(ltm, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("ltm_pyro.studies.search.runner.PAUSES", (0.1,))
    (tmp_path / "rate.py").write_text(FULL_ALWAYS)
    base = ("study", "run", "rate.py", "--base-config", recipe, *SMALL, "--repeats", 0, "--trials", 2)
    code, out, err = ltm(*base, "--json")
    assert (code, out) == (2, ""), err
    said = "ltm study run: The disk under runs/studies/rate is full: make room, and give the same command again."
    assert err.splitlines()[-1] == said
    (tmp_path / "rate.py").write_text(SPACE)
    code, out, err = ltm(*base, "--json")
    assert code == 0, err
    assert [row["state"] for row in json.loads(out)["trials"]] == ["complete"] * 3
