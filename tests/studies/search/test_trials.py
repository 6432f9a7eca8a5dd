"""As many trials as asked for, none twice, none lost; and each fails alone."""

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.trial import TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.runner import Worker
from ltm_pyro.studies.search.storage import open_storage, without_password

PLAN = Plan(study="s", question="?", space={}, recipe="model:\n  rate: 1\ndata: x", budget="1s", at_most={})
TROUBLE = """
'''What can go wrong?'''
import os, signal, sys
from optuna.distributions import CategoricalDistribution
kinds = ["fine", "raises", "nan", "memory", "killed", "exits", "sound"]
space = {"kind": CategoricalDistribution(kinds)}
points = [{"kind": kind} for kind in kinds]
checks = False
def settings(parameters):
    return {}
def objective(setting):
    match setting.parameters["kind"]:
        case "raises":
            raise RuntimeError("something is odd")
        case "nan":
            return {"bound": float("nan")}
        case "memory":
            return {"bound": float(len(bytearray(2**40)))}
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
    return {"bound": 1.0}
"""


def parameters(found):
    return [row["parameters"] for row in found["trials"] if row["role"] == "trial"]


def test_one_seed_proposes_the_same_and_a_pause_changes_nothing(run, study_file):
    source = study_file()
    whole = run(8, source, "whole.db")
    assert parameters(run(5, source, "paused.db")) == parameters(whole)[:5]
    paused = run(8, source, "paused.db")
    assert parameters(paused) == parameters(whole)
    proposed = [tuple(p.values()) for p in parameters(whole)]
    assert len(set(proposed)) == 8
    assert [row["state"] for row in paused["trials"]] == ["complete"] * 9  # and the baseline of the best
    assert parameters(run(8, source, "other.db", seed=1))[1:] != parameters(whole)[1:]


def test_a_setting_that_comes_again_is_trained_with_another_seed(run, study_file):
    text = """
from optuna.distributions import CategoricalDistribution
space = {"model.inference.steps": CategoricalDistribution([2, 4])}
def objective(setting):
    return {"bound": setting.options["seed_everything"] + setting.parameters.get("model.inference.steps", 0)}
"""
    found = run(6, study_file(text))
    searched = found["trials"][:6]
    tried = [(row["parameters"]["model.inference.steps"], row["seed"]) for row in searched]
    assert len(set(tried)) == 6
    assert all(row["figures"]["bound"] == sum(pair) for row, pair in zip(searched, tried, strict=True))


TWICE = """
from optuna.distributions import CategoricalDistribution
space = {"model.inference.steps": CategoricalDistribution([2, 4])}
points = [{"model.inference.steps": steps} for steps in (2, 2, 4, 2)]
def objective(setting):
    steps = setting.parameters.get("model.inference.steps", 4)
    return {"bound": steps - 0.1 * setting.options["seed_everything"]}
"""


def test_an_interrupted_trial_keeps_its_seed_and_the_others_theirs(run, study_file, monkeypatch):
    source, listen = study_file(TWICE), Worker._process_messages

    def interrupted(worker):
        monkeypatch.setattr(Worker, "_process_messages", listen)
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_process_messages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(4, source)
    found = run(4, source, repeats=2)
    assert [(row["number"], row["seed"]) for row in found["trials"][:4]] == [(4, 0), (1, 1), (2, 0), (3, 2)]
    repeats = [row["seed"] for row in found["trials"] if row["role"] == "repeat"]
    assert repeats == [3, 4]  # other seeds than those of the search


def test_trials_die_alone_and_say_why(run, study_file):
    found = run(7, study_file(TROUBLE), memory_gib=64, workers=2)
    said = {row["parameters"]["kind"]: (row["state"], row["reason"] or "") for row in found["trials"]}
    assert said["fine"] == said["sound"] == ("complete", "")
    assert said["raises"] == ("fail", "RuntimeError: something is odd")
    assert said["nan"] == ("fail", "no finite objective: bound is nan")
    assert said["memory"][0] == "fail"
    assert said["memory"][1].startswith("out of memory")
    assert said["killed"][0] == "fail"
    assert "SIGKILL" in said["killed"][1]
    assert said["exits"] == ("fail", "ended without a result (exit code 3)")


def test_a_point_for_which_there_are_no_settings_fails_alone(run, study_file):
    text = """
from optuna.distributions import FloatDistribution
space = {"rate": FloatDistribution(0.1, 1.0)}
first = {"rate": 0.2}
def settings(parameters):
    return {"model.inference.rate": {0.2: 0.2}[parameters["rate"]]}
def objective(setting):
    return {"bound": 1.0}
"""
    found = run(3, study_file(text))
    assert [row["state"] for row in found["trials"]] == ["complete", "fail", "fail", "complete"]  # and a baseline
    assert "`settings` of the study" in found["trials"][1]["reason"]
    assert "KeyError" in found["trials"][1]["reason"]


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def study(url, monkeypatch):
    """A study with three waiting trials, in a storage that calls a worker dead after a second of silence."""
    monkeypatch.setattr(trials, "HEARTBEAT", 1)
    monkeypatch.setattr(trials, "GRACE", 1)
    with open_storage(url) as storage:
        study = trials.open_study(storage, "s", PLAN)
        trials.enqueue(study, [{}] * 3)
        yield study


def claim(study, total=3):
    return trials.claim(study, lambda: trials.counted_trials(study, total), PLAN)


def suggest(trial):
    return trial.suggest_float("x", 0, 1)


def lost_trials(study, clock, seconds=2.0):
    """What a watching worker calls lost after some seconds."""
    liveness = trials.Liveness()
    liveness.lost(study)
    clock[0] += seconds
    return liveness


@pytest.fixture
def clock(monkeypatch):
    """The time that heartbeats are watched by."""
    now = [0.0]
    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
    return now


def test_a_dead_workers_trial_is_tried_again_in_its_place(study, clock):
    lost = claim(study)
    x = suggest(lost)
    again = trials.claim(study, lambda: trials.counted_trials(study, 3), PLAN, lost_trials(study, clock))
    assert (again.number, suggest(again)) == (3, x)
    trials.finish(study, again, {"bound": 1.0}, PLAN)
    kept = [(t.number, t.state) for t in trials.current_trials(study)]
    assert kept == [(3, TrialState.COMPLETE), (1, TrialState.WAITING), (2, TrialState.WAITING)]
    trials.enqueue(study, [{}] * 3)
    assert len(study.trials) == 4


def test_what_was_interrupted_waits_again_with_its_parameters(study):
    trial = claim(study)
    x = suggest(trial)
    trials.requeue(study, trial, "interrupted")
    again = claim(study)
    assert (again.number, suggest(again)) == (3, x)
    assert trials.REASON not in again.user_attrs
    assert study.trials[0].user_attrs[trials.REASON] == "interrupted; it waits again"


def test_a_surplus_of_two_machines_that_fill_at_once_is_never_claimed(study):
    study.enqueue_trial({})
    claimed = [claim(study) for _ in range(4)]
    assert [t and t.number for t in claimed] == [0, 1, 2, None]


@pytest.mark.slow
def test_a_storage_is_made_by_several_at_once(tmp_path):
    code = "import sys; from ltm_pyro.studies.search.storage import open_storage\nwith open_storage(sys.argv[1]): pass"
    words = [sys.executable, "-P", "-c", code]
    url = f"sqlite:///{tmp_path / 's.db'}"
    workers = [subprocess.Popen([*words, url], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [worker.communicate()[1] for worker in workers] == [""] * 3


def test_a_trial_is_claimed_by_one_of_many(study, url, monkeypatch):
    monkeypatch.setattr(trials, "GRACE", 120)
    trials.enqueue(study, [{}] * 20)
    with open_storage(url) as one, open_storage(url) as other, ThreadPoolExecutor(2) as pool:
        workers = [optuna.load_study(study_name="s", storage=storage) for storage in (one, other)]
        claimed = pool.map(lambda one: [t.number for t in iter(lambda: claim(one, 20), None)], workers)
    assert sorted(itertools.chain(*claimed)) == list(range(20))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": "2s"}, "another budget (1s, not 2s): choose another --study-name"),
        ({"pack": "0fed"}, "another pack (unknown, not 0fed): choose another"),
        ({"recipe": "model:\n  rate: 2\ndata: x"}, "another recipe (rate: 1, not rate: 2): choose another"),
    ],
)
def test_another_plan_is_refused(study, url, change, said):
    other = Plan.from_dict(PLAN.as_dict() | change)
    with pytest.raises(UsageError, match=re.escape(said)), open_storage(url) as storage:
        trials.open_study(storage, "s", other)


def test_a_plan_of_another_version_and_a_study_of_others_are_refused(study, url):
    with open_storage(url) as storage:
        optuna.create_study(study_name="foreign", storage=storage).enqueue_trial({})
        with pytest.raises(UsageError, match="'foreign' was not made by `ltm study run`"):
            trials.open_study(storage, "foreign", PLAN)
        study.set_user_attr(trials.PLAN, PLAN.as_dict() | {"colour": "red"})
        with pytest.raises(UsageError, match="'s' was made by another version of ltm_pyro"):
            trials.open_study(storage, "s", PLAN)


def test_no_message_tells_a_password():
    assert without_password("postgresql+psycopg://me:secret@db:5432/x") == "postgresql+psycopg://me:***@db:5432/x"
    assert without_password("postgresql+psycopg://me@db/x") == "postgresql+psycopg://me@db/x"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"
