"""Samplers, pruners, conditional spaces, storages, points of one's own, several objectives: each does what it says."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml

from ltm_pyro.cli import study as study_command
from ltm_pyro.cli.arguments import Parser
from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search import Study, trials
from ltm_pyro.studies.search import study as search
from ltm_pyro.studies.search.charts import importance
from ltm_pyro.studies.search.samplers import PRUNERS, SAMPLERS, make_pruner
from ltm_pyro.studies.search.storage import open_storage
from tests.studies.search.conftest import FREE

SMOOTH = """
from optuna.distributions import FloatDistribution
space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
checks = False
def settings(parameters):
    return {}
def objective(setting):
    x, y = setting.parameters["x"], setting.parameters["y"]
    return {"bound": (x - 0.3) ** 2 + (y - 0.6) ** 2, "kl": x, "prior": y}
"""
CONDITIONAL = """
def suggest(trial):
    kind = trial.suggest_categorical("kind", ["flat", "steep"])
    if kind == "steep":
        return {"kind": kind, "slope": trial.suggest_float("slope", 1.0, 2.0)}
    return {"kind": kind}
checks = False
def settings(parameters):
    return {"model.inference.rate": 0.1 * parameters.get("slope", 1.0)}
def objective(setting):
    return {"bound": setting.parameters.get("slope", 1.5)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"grid", "random"}))
def test_a_sampler_searches_and_is_named(run, study_file, sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    objectives = ("kl", "prior") if sampler.startswith("nsga") else ("bound",)
    found = run(8, study_file(SMOOTH), sampler=sampler, minimise=objectives)
    points = [tuple(row["parameters"].values()) for row in found["trials"]]
    assert [row["state"] for row in found["trials"]] == ["complete"] * 8
    assert len({*points}) == 8
    assert found["sampler"] == sampler


@pytest.mark.slow
def test_samplers_that_learn_come_nearer_than_chance(run, study_file):
    def later(sampler):
        rows = run(16, study_file(SMOOTH), f"{sampler}.db", sampler=sampler, workers=2)["trials"]
        return np.mean([row["figures"]["bound"] for row in rows[8:]])

    assert later("gp") < 0.5 * later("random")


def test_a_grid_is_every_combination(run, study_file):
    text = SMOOTH.replace("FloatDistribution(0, 1)}", "FloatDistribution(0, 1, step=0.5)}").replace(
        '"x": FloatDistribution(0, 1)', '"x": FloatDistribution(0, 1, step=1.0)'
    )
    found = run(6, study_file(text), sampler="grid")
    points = [(row["parameters"]["x"], row["parameters"]["y"]) for row in found["trials"]]
    assert points == [(x, y) for x in (0, 1) for y in (0, 0.5, 1)]
    with pytest.raises(UsageError, match="The sampler grid needs choices or a `step` of x, not 0"):
        run(6, study_file(SMOOTH), sampler="grid")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"sampler": "tpee"}, "sampler 'tpee' (did you mean tpe?)"),
        ({"pruner": "hyper"}, "There is no pruner 'hyper'"),
        ({"minimise": ("bound", "bound")}, "bound is an objective twice"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(run, study_file, names, said):
    with pytest.raises(UsageError) as caught:
        run(1, study_file(), **names)
    assert said in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", sorted(PRUNERS.keys() - {"none"}))
def test_a_pruner_gives_up_what_is_behind(pruner):
    """On reports as a trial sends them: all but the first ones are far behind the best."""
    study = optuna.create_study(pruner=make_pruner(pruner))
    given_up = 0
    for number in range(20):
        trial, level = study.ask(), 0.0 if number < 6 else 5.0
        for step in range(12) if pruner == "wilcoxon" else (1, 3):
            trial.report(level + 0.01 * step + 0.001 * number, step)
        if trial.should_prune():
            given_up += 1
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, level + 0.001 * number)
    assert given_up >= 8


def test_wilcoxon_compares_documents(run, study_file):
    text = """
from optuna.distributions import FloatDistribution
space = {"x": FloatDistribution(0, 1)}
first = {"x": 0.0}
checks = False
def settings(parameters):
    return {}
def objective(setting):
    x = setting.parameters["x"]
    for rung in range(2):
        setting.report(rung, x, [d + x for d in range(20)])
    import time; time.sleep(0.3)
    return {"bound": x}
"""
    found = run(4, study_file(text), pruner="wilcoxon")
    assert [row["state"] for row in found["trials"]] == ["complete"] + ["pruned"] * 3
    assert "pruned after 33% of the budget" in found["trials"][1]["reason"]


@pytest.mark.slow
def test_a_conditional_space_has_parameters_for_some_values_only(run, study_file):
    found = run(10, study_file(CONDITIONAL))
    kinds = {row["parameters"]["kind"]: row["parameters"].keys() for row in found["trials"]}
    assert kinds == {"flat": {"kind"}, "steep": {"kind", "slope"}}
    assert [row["state"] for row in found["trials"]] == ["complete"] * 10
    assert len({json.dumps(row["parameters"]) for row in found["trials"] if row["parameters"]["kind"] == "steep"}) > 2
    with pytest.raises(UsageError, match=r"another space \(suggest"):
        run(10, study_file(CONDITIONAL.replace("2.0", "3.0")))


def test_a_conditional_spaces_points_are_checked(run, study_file):
    with pytest.raises(UsageError, match="slope is 9"):
        run(2, study_file(CONDITIONAL + "first = {'kind': 'steep', 'slope': 9.0}\n"))
    found = run(2, study_file(CONDITIONAL + "first = {'kind': 'steep', 'slope': 1.25}\n"))
    assert found["trials"][0]["parameters"] == {"kind": "steep", "slope": 1.25}


@pytest.mark.parametrize("maximise", [("kl",), ("kl", "prior")])
def test_what_is_to_be_large_is_maximised(run, study_file, maximise):
    found = run(6, study_file(SMOOTH), minimise=(), maximise=maximise)
    rows = found["trials"]
    assert found["best"] == max(rows, key=lambda row: row["figures"]["kl"])["number"]
    pairs = {row["number"]: [row["figures"][name] for name in maximise] for row in rows}
    beaten = {
        a for a, x in pairs.items() for y in pairs.values() if y != x and all(p <= q for p, q in zip(x, y, strict=True))
    }
    assert set(found["front"]) == (set(pairs) - beaten if len(maximise) > 1 else set())


def test_objectives_have_names_a_front_and_weights(run, study_file, tmp_path):
    run(8, study_file(SMOOTH), minimise=("kl", "prior"))
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    with Study(url).opened() as opened:
        assert opened.metric_names == ["kl", "prior"]
        assert sorted(t.number for t in opened.best_trials) == Study(url).found["front"]
        assert opened.trials[0].user_attrs["kl"] == opened.trials[0].values[0]
    rows = {row["number"]: row["figures"] for row in Study(url).found["trials"]}
    for name in ("kl", "prior"):
        best = search.write_best(url, None, tmp_path / f"{name}.yaml", None, False, weights={name: 1.0})
        assert best["figures"][name] == min(figures[name] for figures in rows.values())
    with pytest.raises(UsageError, match="--weight names 'bond', which is no objective: choose from kl, prior"):
        search.write_best(url, None, tmp_path / "x.yaml", None, False, weights={"bond": 1.0})


def test_points_of_ones_own_come_first_and_are_checked(run, study_file, tmp_path):
    source = study_file(SMOOTH)
    run(2, source)
    mine = Study(f"sqlite:///{tmp_path / 'studies.db'}")
    assert mine.enqueue({"x": 1}) == 2
    with pytest.raises(UsageError, match="x is 2"):
        mine.enqueue({"x": 2})
    with pytest.raises(UsageError, match="'z' is no parameter"):
        mine.enqueue({"z": 0.5})
    found = run(4, source)
    assert found["trials"][2]["parameters"]["x"] == 1.0
    assert 0 < found["trials"][2]["parameters"]["y"] < 1  # from the sampler


def test_a_study_is_renamed_and_deleted_with_its_checks(run, study_file, tmp_path):
    before = run(3, study_file(), repeats=1)
    mine = Study(f"sqlite:///{tmp_path / 'studies.db'}")
    mine.rename("other")
    after = mine.found
    assert after["study"] == "other"
    assert [row["figures"] for row in after["trials"]] == [row["figures"] for row in before["trials"]]
    with pytest.raises(UsageError, match="names no study's files"):
        mine.rename("a/b")
    assert Study(mine.url, "other").delete() == 3
    with open_storage(mine.url) as storage:
        assert optuna.get_all_study_names(storage) == []


def test_a_study_begins_with_what_another_has_found(run, study_file):
    earlier = run(9, study_file(SMOOTH), name="earlier")
    found = run(7, study_file(SMOOTH), name="later", seed=5, warm_start="earlier", sampler="random")
    best = sorted(earlier["trials"], key=lambda row: row["figures"]["bound"])[:5]
    assert [row["parameters"] for row in found["trials"][:5]] == [row["parameters"] for row in best]
    assert found["trials"][5]["parameters"] not in [row["parameters"] for row in earlier["trials"]]
    with pytest.raises(UsageError, match="There is no study 'none'"):
        run(7, study_file(SMOOTH), name="third", warm_start="none")


def test_a_journal_file_is_a_storage(run, study_file, tmp_path):
    url = f"journal:///{tmp_path / 'deep' / 'studies.log'}"
    found = run(4, study_file(), url)
    assert [row["state"] for row in found["trials"]] == ["complete"] * 5
    assert [row["study"] for row in search.summaries(url)] == ["valley"]
    with open_storage(url) as storage:
        study = trials.load_study(storage, "valley")
        trial = trials.claim(study, lambda: [], trials.plan_of(study))
        assert trial is None


@pytest.mark.slow
def test_a_grpc_proxy_is_a_storage(run, study_file, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"grpc://127.0.0.1:{port}"
    with pytest.raises(UsageError, match=f"The storage {url} does not answer"):
        search.summaries(url)
    code = (
        "import sys, optuna\n"
        "storage = optuna.storages.get_storage(sys.argv[1])\n"
        "optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port=int(sys.argv[2]))"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{tmp_path / 'behind.db'}", str(port)]
    server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        found = run(3, study_file(), url)
        assert [row["state"] for row in found["trials"]] == ["complete"] * 4
    finally:
        server.kill()
        server.wait()
    with pytest.raises(UsageError, match="cannot be used"):
        search.summaries("grpc://localhost")


@pytest.mark.slow
def test_the_slurm_array_runs(recipe, study_file, tmp_path):
    """With a `python` on the path as on a cluster; the tasks of an array share the journal."""
    script = Path(__file__).parents[3] / "examples" / "launch" / "study-slurm.sbatch"
    place = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SHARED": str(tmp_path / "shared")}
    words = [
        "bash",
        script,
        study_file(),
        "--base-config",
        recipe,
        "--budget",
        "1e9flops",
        "--trials",
        "4",
        "--repeats",
        "0",
    ]
    tasks = [
        subprocess.Popen([*map(str, words)], env=os.environ | place | {"SLURM_ARRAY_TASK_ID": str(task)}, cwd=tmp_path)
        for task in range(2)
    ]
    assert [task.wait(240) for task in tasks] == [0, 0]
    found = search.describe(f"journal:///{tmp_path}/shared/studies.log", None)
    assert [row["state"] for row in found["trials"]] == ["complete"] * 5
    assert sorted(path.name for path in (tmp_path / "shared").glob("worker-*")) == ["worker-0", "worker-1"]


def test_the_kubernetes_job_is_a_command_that_there_is():
    path = Path(__file__).parents[3] / "examples" / "launch" / "study-kubernetes.yaml"
    (container,) = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"]
    module, *words = [*container["command"][2:], *container["args"]]
    assert (module, words[:2]) == ("ltm_pyro.cli", ["study", "run"])
    parser = Parser(prog="ltm study run")
    study_command.add_arguments(parser)
    given = parser.parse_args(words[2:])
    assert (given.study, given.trials, given.storage) == ("rate_ratio", 100, "$(STORAGE)")
    assert {env["name"] for env in container["env"]} == {*re.findall(r"\$\((\w+)\)", " ".join(words))}


@pytest.mark.slow
def test_the_estimate_says_what_is_ahead(run, study_file, capfd):
    run(2, study_file(), repeats=6, finalists=4, workers=2)
    said = capfd.readouterr().err
    assert "At most 2 trials and 17 checks are ahead, 2 at a time here, 7.6e+10 FLOPs in all" in said
    run(4, study_file(), repeats=6, finalists=4)
    assert "if nobody else works on them" in capfd.readouterr().err


def test_importance_is_of_what_varied_with_its_uncertainty():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        x, y = (trial.suggest_float(name, 0, 1) for name in "xy")
        trial.suggest_float("fixed", 1, 1)
        study.tell(trial, (x - 0.5) ** 2 + 0.05 * y)
    found = importance(study, 0, study.trials, ["x", "y"])
    assert [*found] == ["x", "y"]
    share, low, high = found["x"]
    assert 0.6 < low <= share <= high <= 1


def test_a_notebook_has_what_the_command_line_has(run, study_file, tmp_path):
    run(2, study_file(FREE), name="mine")
    mine = Study(f"sqlite:///{tmp_path / 'studies.db'}", "mine")
    assert mine.found["recommended"]["trial"] == mine.found["best"]
    written = mine.best(tmp_path / "best.yaml")
    assert (tmp_path / "best.yaml").read_text().startswith(f"# Trial {written['number']} of the study 'mine': bound ")
