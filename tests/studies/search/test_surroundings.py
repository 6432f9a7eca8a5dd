"""What goes wrong around a study is no bad setting: it is waited for, tried again, or told in one sentence."""

import json

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search import runner, trials
from ltm_pyro.studies.search import storage as storages
from ltm_pyro.studies.search import study as search
from ltm_pyro.studies.search.process import FIGURES
from ltm_pyro.studies.search.report import write_report
from ltm_pyro.studies.search.runner import Worker
from ltm_pyro.studies.search.storage import Patient, file_of, open_existing, open_storage
from ltm_pyro.utils.files import DiskFullError
from tests.studies.search.conftest import FREE

ONCE = """
from pathlib import Path
from optuna.distributions import CategoricalDistribution
space = {"x": CategoricalDistribution([1, 2, 3])}
points = [{"x": x} for x in (1, 2, 3)]
checks = False
def settings(parameters):
    return {}
def objective(setting):
    mark = setting.run.parents[1] / "seen"
    if setting.parameters["x"] == 2 and not mark.exists():
        mark.touch()
        WHAT
    return {"bound": float(setting.parameters["x"])}
"""
CAUSES = {
    "full": 'raise OSError(28, "No space left on device")',
    "disk": 'raise OSError(5, "Input/output error")',
    "removed": "import shutil; shutil.rmtree(setting.run.parent); raise RuntimeError('odd')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Waits are short."""
    monkeypatch.setattr(runner, "PAUSES", (0.1, 0.1))
    monkeypatch.setattr(storages, "PAUSES", (0.05,))


@pytest.mark.parametrize("cause", CAUSES)
def test_a_fault_of_the_machine_costs_no_trial_and_leaves_no_hole(run, study_file, cause):
    found = run(3, study_file(ONCE.replace("WHAT", CAUSES[cause])))
    assert [(row["parameters"]["x"], row["state"]) for row in found["trials"]] == [(x, "complete") for x in (1, 2, 3)]
    assert found["trials"][1]["number"] == 3  # it was tried again, in its place


def test_after_a_few_faults_of_one_cause_the_worker_stops_and_says_so(run, study_file, tmp_path):
    source = study_file(ONCE.replace("mark.touch()", "").replace("WHAT", CAUSES["full"]))
    with pytest.raises(DiskFullError, match=r"The disk under .* is full: make room"):
        run(3, source)
    with open_storage(f"sqlite:///{tmp_path / 'studies.db'}") as storage:
        states = [t.state for t in trials.current_trials(trials.load_study(storage, "valley"))]
    assert sorted(states, key=str) == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]
    (tmp_path / "seen").touch()
    assert [row["state"] for row in run(3, source)["trials"]] == ["complete"] * 3


SAID = """
from optuna.distributions import CategoricalDistribution
kinds = ["fine", "none", "text", "step", "value", "list"]
space = {"kind": CategoricalDistribution(kinds)}
points = [{"kind": kind} for kind in kinds]
checks = False
def settings(parameters):
    return {}
def objective(setting):
    match setting.parameters["kind"]:
        case "none":
            return None
        case "text":
            return {"bound": "low"}
        case "step":
            setting.report("late", 1.0)
        case "value":
            setting.report(0, None)
        case "list":
            return {"bound": None}
    return {"bound": 1.0, "flops": 2.0}
"""


def test_what_a_trial_says_is_checked(run, study_file):
    found = run(6, study_file(SAID))
    said = {row["parameters"]["kind"]: (row["state"], row["reason"]) for row in found["trials"]}
    assert said["fine"] == ("complete", None)
    assert said["none"] == ("fail", "`objective` returned None: let it return figures by name, such as {'bound': 3.2}.")
    assert said["text"] == ("fail", "`objective` returned 'bound': 'low', which is no number by a name.")
    assert said["step"] == ("fail", "`report` was given the rung 'late': there are 0, 1.")
    assert said["value"] == ("fail", "`report` was given None: give a number.")
    assert said["list"][0] == "fail"


def test_a_report_with_two_objectives_fails_its_trial_alone(run, study_file):
    text = SAID.replace('setting.report("late", 1.0)', "setting.report(0, 1.0)")
    found = run(6, study_file(text), minimise=("bound", "flops"))
    said = {row["parameters"]["kind"]: (row["state"], row["reason"]) for row in found["trials"]}
    assert said["step"] == ("fail", "`report` needs one objective, and this study has several: leave it out.")
    assert said["fine"][0] == "complete"


def test_figures_of_which_the_storage_has_not_heard_are_taken_from_the_runs_folder(run, study_file, monkeypatch):
    """As of a worker that ended while the storage was away."""
    source, handle, lost = study_file(FREE + "checks = False\n"), Worker._handle, []

    def deaf(worker, job, message):
        if message[0] == "done" and not lost:
            lost.append(job.trial.number)
            raise KeyboardInterrupt
        return handle(worker, job, message)

    monkeypatch.setattr(Worker, "_handle", deaf)
    with pytest.raises(KeyboardInterrupt):
        run(2, source)
    started = []
    monkeypatch.setattr(runner, "start_process", lambda task, of=runner.start_process: started.append(task) or of(task))
    found = run(2, source)
    assert [row["state"] for row in found["trials"]] == ["complete"] * 2
    assert lost == [0]
    assert len(started) == 1  # of the second trial
    kept = json.loads((started[0].setting["run"].parent / "trial-0000" / FIGURES).read_text())
    assert found["trials"][0]["figures"] == kept["figures"]


class Flaky:
    """A storage's method that is away for some calls."""

    def __init__(self, error, times):
        self.error, self.left = error, times

    def __call__(self, *args):
        if self.left:
            self.left -= 1
            raise self.error
        return args


AWAY = OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly"))


def test_a_storage_that_is_away_is_waited_for(tmp_path, capsys):
    waited, back = [], []
    with open_storage(f"sqlite:///{tmp_path / 's.db'}") as storage:
        storage.get_trial = Flaky(AWAY, 3)
        patient = Patient(storage, "postgresql://me:secret@db/x", waited.append, lambda: back.append(1))
        assert storage.get_trial(7) == (7,)
        assert (waited, back, patient.is_away) == ([0.05] * 3, [1], False)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("postgresql://me:***@db/x does not answer (")
    assert said[1].startswith("postgresql://me:***@db/x is back after ")


def test_a_storage_that_refuses_what_it_was_asked_is_not_away(tmp_path, monkeypatch):
    waited = []
    with open_storage(f"sqlite:///{tmp_path / 's.db'}") as storage:
        storage.get_trial = Flaky(OperationalError("SELECT 1", {}, Exception("no such table: trials")), 9)
        storage.get_study_id_from_name = Flaky(AWAY, 99)
        Patient(storage, "url", waited.append)
        with pytest.raises(OperationalError):
            storage.get_trial(7)
        monkeypatch.setattr(storages, "PATIENCE", -1)
        with pytest.raises(OperationalError):
            storage.get_study_id_from_name("x")
    assert waited == []


def test_a_worker_counts_as_dead_by_its_heartbeats_alone_and_not_after_an_outage(tmp_path, monkeypatch):
    now = [0.0]
    with open_storage(f"sqlite:///{tmp_path / 's.db'}") as storage:
        study = optuna.create_study(storage=storage)
        trial = study.ask()
        monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
        liveness = trials.Liveness()
        assert liveness.lost(study) == []  # no trial of ours, however long it runs
        now[0] += 2 * trials.GRACE
        assert liveness.lost(study) == []
        trials.record_heartbeat(study, trial)
        assert liveness.lost(study) == []
        now[0] += trials.GRACE + 1
        liveness.forget()  # as after an outage
        assert liveness.lost(study) == []
        now[0] += trials.GRACE + 1
        assert [t.number for t in liveness.lost(study)] == [trial.number]
        trials.record_heartbeat(study, trial)
        assert liveness.lost(study) == []


def test_a_trial_that_its_worker_was_to_queue_again_is_queued_by_the_next(tmp_path):
    with open_storage(f"sqlite:///{tmp_path / 's.db'}") as storage:
        study = optuna.create_study(storage=storage)
        trials.enqueue(study, [{"x": 1.0}])
        (waiting,) = study.trials
        storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        storage.set_trial_user_attr(waiting._trial_id, trials.AGAIN, True)
        storage.set_trial_state_values(waiting._trial_id, TrialState.FAIL)
        for _ in range(2):
            trials._complete_retries(study)
        assert [(t.state, trials.fixed_point(t)) for t in trials.current_trials(study)] == [
            (TrialState.WAITING, {"x": 1.0})
        ]


def added(study, rate, value):
    space = {"model.inference.rate": FloatDistribution(0.1, 1.0), "model.inference.steps": STEPS}
    params = {"model.inference.rate": rate, "model.inference.steps": 2}
    return study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))


STEPS = optuna.distributions.CategoricalDistribution([2, 4])


def test_trials_that_others_add_are_taken_as_they_are(run, study_file, tmp_path):
    source, url = study_file(), f"sqlite:///{tmp_path / 'studies.db'}"
    run(2, source)
    with open_storage(url) as storage:
        study = trials.load_study(storage, "valley")
        added(study, 0.5, -7.0)
        study.enqueue_trial({"model.inference.rate": 0.9})
        study.enqueue_trial({"model.inference.rate": 9.0})
        study.enqueue_trial({"model.inference.rat": 0.9})
    found = run(6, source)
    rows = {row["number"]: row for row in found["trials"] if row["role"] in ("trial", "added")}
    assert (rows[2]["role"], rows[2]["figures"]) == ("added", {"bound": -7.0})
    assert (rows[3]["state"], rows[3]["parameters"]["model.inference.rate"]) == ("complete", 0.9)
    assert (rows[4]["state"], rows[5]["state"]) == ("fail", "fail")
    assert "model.inference.rate is 9.0, not within 0.1 to 1.0" in rows[4]["reason"]
    assert "did you mean 'model.inference.rate'?" in rows[5]["reason"]
    assert sum(row["role"] == "trial" for row in rows.values()) == 6
    assert found["best"] == 2
    written = search.write_best(url, None, tmp_path / "best.yaml", None, force=False)
    assert written["parameters"]["model.inference.rate"] == 0.5
    assert write_report(url, None, tmp_path / "report", force=False)["files"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "first = {'model.inference.rate': 0.3, 'model.inference.steps': 3}",
            "model.inference.steps is 3, not within 2",
        ),
        ("first = {'model.inference.rate': 7.0, 'model.inference.steps': 2}", "rate is 7.0, not within 0.1 to 1.0"),
        ("first = {'model.inference.rate': 0.3}", "'model.inference.steps' is missing"),
        ("points = [{'model.inference.rat': 0.3, 'model.inference.steps': 2}]", "mean 'model.inference.rate'"),
        ("space['x'] = CategoricalDistribution([(1, 2)])", "The choice (1, 2) of x in "),
        ("setings = dict", "defines `setings`, which means nothing here (did you mean `settings`?)"),
        ("suggest = dict", "defines both `space` and `suggest`"),
    ],
)
def test_points_and_names_are_checked_before_anything_runs(run, study_file, tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        run(2, study_file(FREE + text))
    assert said in str(caught.value)
    assert not (tmp_path / "studies.db").exists()


def test_nothing_is_sampled_beside_a_grid(run, study_file):
    with pytest.raises(UsageError, match="The grid of valley has 3 points, and nothing is sampled"):
        run(4, study_file(ONCE.replace("WHAT", "pass")))


@pytest.mark.parametrize("options", ["?timeout=30", "?timeout=30&check_same_thread=false"])
def test_a_storages_address_may_have_options(run, study_file, tmp_path, options):
    found = run(1, study_file(), f"sub/s.db{options}")
    assert found["trials"][0]["state"] == "complete"
    assert (tmp_path / "sub" / "s.db").is_file()
    assert file_of(f"sqlite:///a b.db{options}").name == "a b.db"
    with pytest.raises(UsageError, match="no storage at"), open_existing(f"sqlite:///{tmp_path}/none.db{options}"):
        pass


def test_a_changed_space_says_what_changed_and_moved_data_are_the_same(run, study_file, recipe, tmp_path):
    run(1, study_file())
    with pytest.raises(UsageError) as caught:
        run(1, study_file(FREE.replace("(0.1, 1.0)", "(0.1, 2.0)")))
    assert "another space (model.inference.rate: low 0.1, high 1.0, not low 0.1, high 2.0)" in str(caught.value)
    (tmp_path / "moved").symlink_to(recipe.parent / "data")
    found = run(2, study_file(), given={"data.directory": str(tmp_path / "moved")})
    assert [row["state"] for row in found["trials"][:2]] == ["complete"] * 2


def test_times_end_a_trial_and_a_worker(run, study_file):
    slow = ONCE.replace("WHAT", "import time; time.sleep(60)")
    found = run(3, study_file(slow), trial_seconds=8)
    assert [row["state"] for row in found["trials"]] == ["complete", "fail", "complete"]
    assert "took longer than the 8 s of --trial-timeout" in found["trials"][1]["reason"]
    found = run(3, study_file(slow), "late.db", seconds=0.0)
    assert {row["state"] for row in found["trials"]} == {"waiting"}
