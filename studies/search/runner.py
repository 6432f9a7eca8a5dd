"""A worker: claims trials, runs each in a process of its own, and records its outcome."""

import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.data.manifest import is_pack
from ltm_pyro.errors import UsageError
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.budget import parse_budget
from ltm_pyro.studies.configure import Values
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.definition import Definition, why_outside
from ltm_pyro.studies.search.objective import ASKED, options_of
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.process import FULL, Task, exit_reason, kept_figures, start_process
from ltm_pyro.studies.search.recommend import comparable, points_of, wanted_repeats
from ltm_pyro.studies.search.samplers import RUNGS
from ltm_pyro.studies.search.storage import Patient
from ltm_pyro.studies.search.watch import Watch
from ltm_pyro.utils.files import DiskFullError, atomic_write, new_folder, writing
from ltm_pyro.utils.safe_yaml import load_yaml

BASE = "base.yaml"
POLL = 1.0  # seconds
PAUSES = (5, 10, 20, 40, 80)  # seconds after each failure in a row of one cause; after one more the worker stops
KILLED = "killed (SIGKILL)"  # begins the reason of a trial whose process was killed: by the system, or by somebody
Message = tuple[Any, ...]


@dataclass(kw_only=True)
class Job:
    """A trial, its process, and the messages of it that have not been acted on."""

    study: optuna.Study
    trial: optuna.Trial
    process: Any
    connection: Connection
    slot: int
    started: float = field(default_factory=time.monotonic)
    heartbeat: float = field(default_factory=time.monotonic)  # when the last one was recorded
    messages: deque[Message] = field(default_factory=deque)
    ended: bool = False

    def collect(self) -> None:
        """Takes the messages of the process out of its pipe, and how it ended if it ended without a result."""
        try:
            while not self.ended and self.connection.poll():
                self.messages.append(self.connection.recv())
        except (EOFError, OSError):
            self.process.join()
            self.messages.append(("failed", exit_reason(self.process.exitcode)))
            self.ended = True


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a study may use of this machine.

    Args:
        out: where the trials' runs go.
        workers: trials at a time; on a machine with GPUs each sees one of them.
        memory_gib: the most memory one trial may allocate.
        trial_seconds: the longest that one trial may take.
        seconds: after which this worker starts no further trial.
    """

    out: Path
    workers: int = 1
    memory_gib: float | None = None
    trial_seconds: float | None = None
    seconds: float | None = None


@dataclass(kw_only=True)
class Worker:
    """Runs a study's trials until as many as asked for are finished, wherever they run.

    Args:
        study, checks: the search, and its companion for the baseline and the repeats.
        total: N, over all workers and restarts.
        finalists, repeats: how many of the best settings are trained again, and with how many other seeds.
        patient: the storage's, if it waits for one that is away.
    """

    study: optuna.Study
    checks: optuna.Study
    definition: Definition
    plan: Plan
    total: int
    finalists: int
    repeats: int
    resources: Resources
    watch: Watch
    patient: Patient | None = None
    liveness: trials.Liveness = field(default_factory=trials.Liveness)
    jobs: list[Job] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    troubles: tuple[str, int, float] = ("", 0, 0.0)  # cause, failures in a row, and until when nothing is started

    def run(self) -> None:
        """Works until all are finished; on Ctrl-C its trials are enqueued again, and `KeyboardInterrupt` is raised."""
        try:
            while self._start_trials() or self.jobs or self._is_paused() or self._trials_run_elsewhere():
                self._process_messages()
        finally:
            for job in self.jobs:
                _stop(job)
                if not (self.patient and self.patient.is_away):  # else others notice that the heartbeats have ended
                    trials.requeue(job.study, job.trial, "interrupted")

    def listen(self, seconds: float) -> None:
        """Takes in what the trials' processes say for some seconds; they would stand still if nobody read it."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            sources = [x for job in self.jobs if not job.ended for x in (job.connection, job.process.sentinel)]
            if not sources:
                time.sleep(left)
            elif wait(sources, left):
                for job in self.jobs:
                    job.collect()
                    job.ended = job.ended or any(m[0] in ("done", "failed", "trouble") for m in job.messages)
                if not any(job.messages for job in self.jobs):
                    time.sleep(min(left, 0.05))

    def _is_paused(self) -> bool:
        return time.monotonic() < self.troubles[2]

    def _start_trials(self) -> bool:
        """Starts trials while a worker is free; whether one was started."""
        self._send_heartbeats()  # first, because claiming declares trials without a heartbeat dead
        limit, before = self.resources.seconds, len(self.jobs)
        if self._is_paused() or (limit is not None and time.monotonic() - self.begun > limit):
            return False
        while len(self.jobs) < self.resources.workers and (claimed := self._claim()):
            try:
                job = self._start(*claimed)
            except UsageError as error:  # raised by the study's own `settings`, or of a point outside the space
                trials.fail(*claimed, str(error))
            else:
                self.jobs += [job] if job else []
        return len(self.jobs) > before

    def _claim(self) -> tuple[optuna.Study, optuna.Trial] | None:
        """A trial of the search, or one of the checks once all of those are finished."""
        if trial := trials.claim(self.study, lambda: self._counting_trials()[0], self.plan, self.liveness):
            return self.study, trial
        trial = trials.claim(self.checks, lambda: self._counting_trials()[1], self.plan, self.liveness)
        return (self.checks, trial) if trial else None

    def _trials_run_elsewhere(self) -> bool:
        """Whether trials run on other machines; they are ours to retry if their worker dies."""
        limit = self.resources.seconds
        if limit is not None and time.monotonic() - self.begun > limit:
            return False
        return any(not t.state.is_finished() for counted in self._counting_trials() for t in counted)

    def _counting_trials(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The trials of the search that count, and the checks of its best settings, once they are known."""
        searched = trials.counted_trials(self.study, self.total)
        if not self.definition.checks or any(not t.state.is_finished() for t in searched):
            return searched, []
        existing = trials.existing_checks(self.checks)
        every = [*trials.current_trials(self.study), *existing.values()]
        points = comparable(points_of([trials.row(t, self.plan) for t in every], *self.plan.objectives[0]))
        if not points:
            return searched, []

        def is_done(of: int, repeat: int) -> bool:
            check = existing.get(("repeat", of, repeat))
            return check is not None and check.state.is_finished()

        finalists = self.finalists if len(self.plan.objectives) == 1 else 1
        repeats, _ = wanted_repeats(points, finalists, self.repeats, is_done)
        wanted: list[Values] = [{"role": "baseline", "of": points[0].number}]
        wanted += [{"role": "repeat", "of": of, "repeat": repeat} for of, repeat in repeats]
        return searched, trials.ensure_checks(self.checks, wanted)

    def _start(self, study: optuna.Study, trial: optuna.Trial) -> Job | None:
        """Starts a trial; None if its figures are known, from an attempt of which the storage has not heard."""
        settings, parameters = self._settings(study, trial)
        seed = self._seed(study, trial)
        slot = min(set(range(self.resources.workers)) - {job.slot for job in self.jobs})
        run = self.resources.out / f"{'check' if study is self.checks else 'trial'}-{trial.number:04}"
        named = (*dict(self.plan.objectives), *self.plan.at_most)
        setting = {
            "options": options_of(parse_budget(self.plan.budget), settings, run, seed),
            "parameters": parameters,
            "samples": self.plan.samples,
            "limit": self.plan.limit,
            "k_hat": "k_hat" in named,
            "asked": tuple(name for name in ASKED if name in named),
            "pruned": self.plan.pruned and study is self.study,
        }
        content = [self.plan.as_dict(), study.study_name, settings, parameters, seed]
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        devices = torch.cuda.device_count()
        task = Task(
            study=self.definition.source,
            setting=setting | {"recipe": str(self.resources.out / BASE), "run": run},
            threads=max(1, torch.get_num_threads() // self.resources.workers),
            device=slot % devices if devices else None,
            memory_gib=self.resources.memory_gib,
            objectives=len(self.plan.objectives),
            key=key,
        )
        earlier = re.fullmatch(r".*/((trial|check)-[0-9]{1,9})", str(trial.user_attrs.get(trials.RUN)))
        trial.set_user_attr(trials.SETTINGS, settings)
        trial.set_user_attr(trials.RUN, str(run.resolve()))
        trial.set_user_attr(trials.SEED, seed)
        place = earlier and self.resources.out / earlier[1]  # a storage is data: nothing else is read that it names
        if place and (figures := kept_figures(place, key)):
            trial.set_user_attr(trials.RUN, str(place.resolve()))
            trials.finish(study, trial, figures, self.plan)
            return None
        self.write_base()
        self.watch.trial_started(slot, run.name, parameters)
        process, connection = start_process(task)
        return Job(study=study, trial=trial, process=process, connection=connection, slot=slot)

    def write_base(self, anew: bool = False) -> bool:
        """Writes the base recipe for the trials' processes if it is missing, or ``anew``; whether it was missing."""
        base = self.resources.out / BASE
        missing = not base.is_file()
        if missing or anew:
            with writing(self.resources.out), new_folder(self.resources.out), atomic_write(base) as new:
                new.write_text(self.plan.recipe, "utf-8")
        return missing

    def _settings(self, study: optuna.Study, trial: optuna.Trial) -> tuple[Values, Values]:
        """The recipe settings and parameters of a trial. Raises `UsageError` for a point outside the space."""
        if study is self.study:
            given = trials.fixed_point(study.get_trials(deepcopy=False)[trial.number])
            space = self.definition.space  # others may enqueue points
            if not self.definition.suggest and (wrong := why_outside(given, space, partial=True)):
                raise UsageError(f"The point {given} is none of the space: {wrong}.")
            parameters = self.definition.choose(trial)
            if given and self.definition.suggest and (wrong := self.definition.misfit(parameters)):
                raise UsageError(f"The point {given} is none of the space: {wrong}.")
            return self.definition.options(parameters), parameters
        attributes = trial.user_attrs
        point = self.study.get_trials(deepcopy=False)[attributes["of"]].params
        if wrong := self.definition.misfit(point):  # others may write to the storage, and settings may name code
            raise UsageError(
                f"The storage has trial {attributes['of']} at a point outside the study's space, {point}: {wrong}."
            )
        settings = self.definition.options(point)
        if attributes["role"] == "baseline":
            return ar_baseline(settings), {"baseline of": attributes["of"]}
        return settings, {"repeat of": attributes["of"]}

    def _seed(self, study: optuna.Study, trial: optuna.Trial) -> int:
        """The training's random seed; a trial that was interrupted keeps its own."""
        attributes = trial.user_attrs
        if trials.SEED in attributes:
            return int(attributes[trials.SEED])
        if study is self.study:
            return trials.next_seed(study, trial.number, self.plan.seed)
        if attributes["role"] == "baseline":
            return self.plan.seed
        return trials.fresh_seed(self.study, int(attributes["repeat"]), self.plan.seed)

    def _process_messages(self) -> None:
        """Handles the messages that arrive within `POLL` seconds, and ends the processes that are done."""
        if not any(job.messages for job in self.jobs):
            self._wait_for_messages()
        for job in [*self.jobs]:
            job.collect()
            late = self.resources.trial_seconds
            if late is not None and time.monotonic() - job.started > late and not job.ended:
                job.messages.append(("failed", f"took longer than the {late:g} s of --trial-timeout"))
            while job.messages:
                if self._handle(job, job.messages[0]):  # it stays until the storage has it
                    self.jobs.remove(job)
                    _stop(job)
                    self.watch.trial_ended(job.slot, job.study, job.trial.number)
                    break
                job.messages.popleft()

    def _wait_for_messages(self) -> None:
        sources = [x for job in self.jobs for x in (job.connection, job.process.sentinel)]
        if sources:
            wait(sources, POLL)
        else:
            time.sleep(POLL)

    def _handle(self, job: Job, message: Message) -> bool:
        """Acts on one message; whether the trial is over."""
        match message:
            case ("tick", progress):
                self.watch.trial_progressed(job.slot, progress)
                return False
            case ("report", rung, bound, documents):
                return self._is_pruned(job, rung, bound, documents)
            case ("trouble", cause):
                self._wait_for_machine(job, cause)
            case ("failed", _) if cause := self._missing():
                self._wait_for_machine(job, cause)
            case ("failed", reason) if reason.startswith(KILLED):
                trials.requeue(job.study, job.trial, reason, limit=1)
            case ("done" | "failed", result):
                with suppress(UpdateFinishedTrialError):  # our heartbeats were late, and another worker runs it now
                    if isinstance(result, dict):
                        trials.finish(job.study, job.trial, result, self.plan)
                        self.troubles = ("", 0, 0.0)
                    else:
                        trials.fail(job.study, job.trial, result)
        return True

    def _missing(self) -> str | None:
        """What the trials need and is gone, whatever their settings; the base recipe is written again."""
        data = str(load_yaml(self.plan.recipe)["data"]["directory"])
        if "://" not in data and not is_pack(data):
            return f"the packed data at {data} are gone"
        return f"{self.resources.out} was removed" if self.write_base() else None

    def _wait_for_machine(self, job: Job, cause: str) -> None:
        """Lets a trial wait again that failed by no fault of its own; `UsageError` after too many in a row."""
        trials.requeue(job.study, job.trial, cause)
        last, count, until = self.troubles
        if cause == last and job.started < until:  # of the same wave
            return
        count = count + 1 if cause == last else 1
        if count > len(PAUSES):
            if cause == FULL:
                raise DiskFullError(
                    f"The disk under {self.resources.out} is full: make room, and give the same command again."
                )
            raise UsageError(
                f"{count} trials in a row ended because {cause}: mend it, and give the same command again; none counts."
            )
        self.troubles = (cause, count, time.monotonic() + PAUSES[count - 1])
        self.watch.say(f"{cause}: trial {job.trial.number} waits again, for {PAUSES[count - 1]} s at least.")

    def _is_pruned(self, job: Job, rung: int, bound: float, documents: Sequence[float]) -> bool:
        """Reports the bound at a rung to the pruner; whether the trial is given up."""
        if job.study is not self.study:
            return False
        step = round(RUNGS[rung] / RUNGS[0])
        if self.plan.pruner == "wilcoxon" and rung == len(RUNGS) - 1:  # document by document, beside the best trial
            for index, value in enumerate(documents):
                job.trial.report(value, index)
        elif self.plan.pruner != "wilcoxon":
            job.trial.report(bound, step)
        if not job.trial.should_prune():
            return False
        reason = f"pruned after {RUNGS[rung]:.0%} of the budget, bound {bound:.4f}"
        trials.fail(job.study, job.trial, reason, TrialState.PRUNED)
        return True

    def _send_heartbeats(self) -> None:
        for job in self.jobs:
            if time.monotonic() - job.heartbeat > trials.HEARTBEAT / 2:
                with suppress(UpdateFinishedTrialError):
                    trials.record_heartbeat(job.study, job.trial)
                job.heartbeat = time.monotonic()


def _stop(job: Job) -> None:
    job.process.kill()
    job.process.join()
    job.connection.close()
