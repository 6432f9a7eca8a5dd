"""A worker: claims trials, runs each in a process of its own, and records its outcome."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.budget import parse_budget
from ltm_pyro.studies.configure import Values
from ltm_pyro.studies.search import storage, trials
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.objective import RUNGS, options_of
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.process import Task, exit_reason, start_process
from ltm_pyro.studies.search.watch import Watch
from ltm_pyro.utils.files import DiskFullError

POLL = 1.0  # seconds


@dataclass
class Job:
    """A trial and its process."""

    study: optuna.Study
    trial: optuna.Trial
    process: Any
    connection: Connection
    slot: int
    heartbeat: float = field(default_factory=time.monotonic)  # when the last one was recorded


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a study may use of this machine.

    Args:
        out: where the trials' runs go.
        workers: trials at a time; on a machine with GPUs each sees one of them.
        memory_gib: the most memory one trial may allocate.
    """

    out: Path
    workers: int = 1
    memory_gib: float | None = None


@dataclass
class Worker:
    """Runs a study's trials until as many as asked for are finished, wherever they run.

    Args:
        study, checks: the search, and its companion for the baseline and the repeats.
        total: N, over all workers and restarts.
        roles: the checks of the best setting.
    """

    study: optuna.Study
    checks: optuna.Study
    definition: Definition
    plan: Plan
    total: int
    roles: list[Values]
    resources: Resources
    watch: Watch
    jobs: list[Job] = field(default_factory=list)

    def run(self) -> None:
        """Works until all are finished; on Ctrl-C its trials are enqueued again, and `KeyboardInterrupt` is raised."""
        try:
            while self._start_trials() or self.jobs or self._trials_run_elsewhere():
                self._process_messages()
        finally:
            for job in self.jobs:
                _stop(job)
                with suppress(UpdateFinishedTrialError):
                    trials.requeue(job.study, job.trial)

    def _start_trials(self) -> bool:
        """Starts trials while a worker is free; whether one was started."""
        self._send_heartbeats()  # first, because claiming declares trials without a heartbeat dead
        before = len(self.jobs)
        while len(self.jobs) < self.resources.workers and (claimed := self._claim()):
            try:
                self.jobs.append(self._start(*claimed))
            except UsageError as error:  # raised by the study's own `settings`
                trials.fail(*claimed, str(error))
        return len(self.jobs) > before

    def _claim(self) -> tuple[optuna.Study, optuna.Trial] | None:
        """A trial of the search, or one of the checks once all of those are finished."""
        if trial := trials.claim(self.study, lambda: self._counting_trials()[0], self.plan.seed):
            return self.study, trial
        trial = trials.claim(self.checks, lambda: self._counting_trials()[1], self.plan.seed)
        return (self.checks, trial) if trial else None

    def _trials_run_elsewhere(self) -> bool:
        """Whether trials run on other machines; they are ours to retry if their worker dies."""
        return any(not t.state.is_finished() for counted in self._counting_trials() for t in counted)

    def _counting_trials(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The trials of the search that count, and the checks of its best setting, once it is known."""
        searched, chosen = trials.current_trials(self.study)[: self.total], trials.best_trial(self.study)
        if not self.roles or chosen is None or any(not t.state.is_finished() for t in searched):
            return searched, []
        return searched, trials.ensure_checks(self.checks, chosen, self.roles)

    def _start(self, study: optuna.Study, trial: optuna.Trial) -> Job:
        settings, parameters = self._settings(study, trial)
        seed = self._seed(study, trial)
        slot = min(set(range(self.resources.workers)) - {job.slot for job in self.jobs})
        run = self.resources.out / f"{'check' if study is self.checks else 'trial'}-{trial.number:04}"
        setting = {
            "recipe": str(self.resources.out / "base.yaml"),
            "options": options_of(parse_budget(self.plan.budget), settings, run, seed),
            "parameters": parameters,
            "run": run,
            "samples": self.plan.samples,
            "limit": self.plan.limit,
            "k_hat": "k_hat" in {*self.plan.at_most, *self.plan.minimise},
            "pruned": self.plan.pruned and study is self.study,
        }
        devices = torch.cuda.device_count()
        task = Task(
            study=self.definition.source,
            setting=setting,
            threads=max(1, torch.get_num_threads() // self.resources.workers),
            device=slot % devices if devices else None,
            memory_gib=self.resources.memory_gib,
        )
        trial.set_user_attr(trials.SETTINGS, settings)
        trial.set_user_attr(trials.RUN, str(run.resolve()))
        trial.set_user_attr(trials.SEED, seed)
        self.watch.trial_started(slot, run.name, parameters)
        return Job(study, trial, *start_process(task), slot)

    def _settings(self, study: optuna.Study, trial: optuna.Trial) -> tuple[Values, Values]:
        """The recipe settings and parameters of a trial."""
        if study is self.study:
            parameters = {name: trials.suggest(trial, name, d) for name, d in self.definition.space.items()}
            return self.definition.options(parameters), parameters
        attributes = trial.user_attrs
        point = self.study.get_trials(deepcopy=False)[attributes["of"]].params
        if not self.definition.has(point):  # others may write to the storage, and settings may name code
            raise UsageError(f"The storage has trial {attributes['of']} at a point outside the study's space: {point}.")
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
            return self.plan.seed + trials.times_tried_before(study, trial.number)
        if attributes["role"] == "baseline":
            return self.plan.seed
        return trials.last_seed(self.study, attributes["of"]) + int(attributes["repeat"])

    def _process_messages(self) -> None:
        """Handles the messages that arrive within `POLL` seconds, and ends the processes that are done."""
        by_source = {source: job for job in self.jobs for source in (job.connection, job.process.sentinel)}
        ready = {id(by_source[x]): by_source[x] for x in wait(list(by_source), POLL)} if by_source else {}
        if not by_source:
            time.sleep(POLL)
        for job in ready.values():
            if any(self._handle(job, message) for message in _messages(job)):
                self.jobs.remove(job)
                _stop(job)
                self.watch.trial_ended(job.slot, job.study, job.trial.number)

    def _handle(self, job: Job, message: tuple[Any, ...]) -> bool:
        """Acts on one message; whether the trial is over."""
        match message:
            case ("tick", progress):
                self.watch.trial_progressed(job.slot, progress)
                return False
            case ("report", rung, bound):
                return self._is_pruned(job, rung, bound)
            case ("full", _):  # so that no trial counts as failed for it; `run` enqueues them again
                raise DiskFullError(
                    f"The disk under {self.resources.out} is full: make room, and give the same command again."
                )
            case ("done" | "failed", result):
                with suppress(UpdateFinishedTrialError):  # our heartbeats were late, and another worker runs it now
                    record = trials.finish if isinstance(result, dict) else trials.fail
                    record(job.study, job.trial, result)
        return True

    def _is_pruned(self, job: Job, rung: int, bound: float) -> bool:
        """Reports the bound at a rung to the pruner; whether the trial is given up."""
        if job.study is not self.study:
            return False
        job.trial.report(bound, round(RUNGS[rung] / RUNGS[0]))
        if not job.trial.should_prune():
            return False
        reason = f"pruned after {RUNGS[rung]:.0%} of the budget, bound {bound:.4f}"
        trials.fail(job.study, job.trial, reason, TrialState.PRUNED)
        return True

    def _send_heartbeats(self) -> None:
        for job in self.jobs:
            if time.monotonic() - job.heartbeat > storage.HEARTBEAT / 2:
                trials.record_heartbeat(job.study, job.trial)
                job.heartbeat = time.monotonic()


def _stop(job: Job) -> None:
    job.process.kill()
    job.process.join()
    job.connection.close()


def _messages(job: Job) -> Iterator[tuple[Any, ...]]:
    """The messages of a process since the last call; how it ended, if it ended without a result."""
    try:
        while job.connection.poll():
            yield job.connection.recv()
    except (EOFError, OSError):
        job.process.join()
        yield "failed", exit_reason(job.process.exitcode)
