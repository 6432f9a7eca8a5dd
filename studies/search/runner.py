"""A worker: claims trials, runs each in a process of its own, and records what came of it."""

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
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.budget import parse_budget
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.objective import RUNGS, Values, options_of
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.process import Task, ended, start
from ltm_pyro.studies.search.watch import Watch

POLL = 1.0  # seconds
THINKING = {"model.prior": "ltm_pyro.models.GaussianPrior", "model.guide": "ltm_pyro.guides.MeanField"}


@dataclass
class Job:
    """A trial and its process."""

    study: optuna.Study
    trial: optuna.Trial
    process: Any
    connection: Connection
    slot: int
    received: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What this machine gives to a study.

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
    workplace: Workplace
    watch: Watch
    jobs: list[Job] = field(default_factory=list)

    def run(self) -> None:
        """Works to the end; on Ctrl-C its trials wait again, and `KeyboardInterrupt` goes on."""
        try:
            while self._hire() or self.jobs or self._others():
                self._listen()
        finally:
            for job in self.jobs:
                _stop(job)
                with suppress(UpdateFinishedTrialError):
                    trials.give_back(job.study, job.trial)

    def _hire(self) -> bool:
        """Starts trials while there is room; whether one was started."""
        self._beat()  # first, since claiming declares silent trials dead
        before = len(self.jobs)
        while len(self.jobs) < self.workplace.workers and (claimed := self._claim()):
            try:
                self.jobs.append(self._start(*claimed))
            except UsageError as error:  # of the study's own functions, at this point
                trials.fail(*claimed, str(error))
        return len(self.jobs) > before

    def _claim(self) -> tuple[optuna.Study, optuna.Trial] | None:
        """A trial of the search, or one of the checks once all of those are finished."""
        if trial := trials.claim(self.study, lambda: self._counted()[0], self.plan.seed):
            return self.study, trial
        trial = trials.claim(self.checks, lambda: self._counted()[1], self.plan.seed)
        return (self.checks, trial) if trial else None

    def _others(self) -> bool:
        """Whether trials run elsewhere, which may come back to us if their worker dies."""
        return any(not t.state.is_finished() for counted in self._counted() for t in counted)

    def _counted(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The trials of the search that count, and the checks of its best setting, made when it is known."""
        searched, chosen = trials.live(self.study)[: self.total], trials.best(self.study)
        if not self.roles or chosen is None or any(not t.state.is_finished() for t in searched):
            return searched, []
        return searched, trials.checks_of(self.checks, chosen, self.roles)

    def _start(self, study: optuna.Study, trial: optuna.Trial) -> Job:
        settings, parameters = self._point(study, trial)
        seed = self._seed(study, trial)
        slot = min(set(range(self.workplace.workers)) - {job.slot for job in self.jobs})
        run = self.workplace.out / f"{'check' if study is self.checks else 'trial'}-{trial.number:04}"
        setting = {
            "recipe": str(self.workplace.out / "base.yaml"),
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
            threads=max(1, torch.get_num_threads() // self.workplace.workers),
            device=slot % devices if devices else None,
            memory_gib=self.workplace.memory_gib,
        )
        trial.set_user_attr(trials.SETTINGS, settings)
        trial.set_user_attr(trials.SEED, seed)
        self.watch.add(slot, run.name, parameters)
        return Job(study, trial, *start(task), slot)

    def _point(self, study: optuna.Study, trial: optuna.Trial) -> tuple[Values, Values]:
        """What to try: recipe settings and parameters."""
        if study is self.study:
            parameters = {name: trials.suggest(trial, name, d) for name, d in self.definition.space.items()}
            return self.definition.options(parameters), parameters
        noted = trial.user_attrs
        if noted["role"] == "baseline":
            return ar_baseline(noted["settings of"]), {"baseline of": noted["of"]}
        return noted["settings of"], {"repeat of": noted["of"]}

    def _seed(self, study: optuna.Study, trial: optuna.Trial) -> int:
        """The training's; a trial that was interrupted keeps its own."""
        noted = trial.user_attrs
        if trials.SEED in noted:
            return int(noted[trials.SEED])
        if study is self.study:
            return self.plan.seed + trials.seen_before(study, trial.number)
        if noted["role"] == "baseline":
            return self.plan.seed
        return trials.last_seed(self.study, noted["of"]) + int(noted["repeat"])

    def _listen(self) -> None:
        """Hears every process that speaks within a moment, and lets go of those that are done."""
        by_source = {source: job for job in self.jobs for source in (job.connection, job.process.sentinel)}
        ready = {id(by_source[x]): by_source[x] for x in wait(list(by_source), POLL)} if by_source else {}
        if not by_source:
            time.sleep(POLL)
        for job in ready.values():
            if any(self._heard(job, message) for message in _messages(job)):
                self.jobs.remove(job)
                _stop(job)
                self.watch.end(job.slot, job.study, job.trial.number)

    def _heard(self, job: Job, message: tuple[Any, ...]) -> bool:
        """Acts on one message; whether the trial is over."""
        match message:
            case ("tick", progress):
                self.watch.tick(job.slot, progress)
                return False
            case ("report", rung, bound):
                return self._hopeless(job, rung, bound)
            case ("done" | "failed", result):
                with suppress(UpdateFinishedTrialError):  # we were silent for too long, and it runs elsewhere now
                    record = trials.finish if isinstance(result, dict) else trials.fail
                    record(job.study, job.trial, result)
        return True

    def _hopeless(self, job: Job, rung: int, bound: float) -> bool:
        if job.study is not self.study:
            return False
        job.trial.report(bound, round(RUNGS[rung] / RUNGS[0]))
        if not job.trial.should_prune():
            return False
        reason = f"pruned after {RUNGS[rung]:.0%} of the budget, bound {bound:.4f}"
        trials.fail(job.study, job.trial, reason, TrialState.PRUNED)
        return True

    def _beat(self) -> None:
        for job in self.jobs:
            if time.monotonic() - job.received > trials.HEARTBEAT / 2:
                trials.beat(job.study, job.trial)
                job.received = time.monotonic()


def ar_baseline(settings: Values) -> Values:
    """The autoregressive baseline's: same trunk, no thoughts, and nothing of a prior or a guide left to learn."""
    kept = {name: x for name, x in settings.items() if not name.startswith(tuple(THINKING))}
    return {**kept, **THINKING, "model.decoder.init_args.thoughts": 0}


def _stop(job: Job) -> None:
    job.process.kill()
    job.process.join()
    job.connection.close()


def _messages(job: Job) -> Iterator[tuple[Any, ...]]:
    """What a process has said since; that it ended without a last word is its last word."""
    try:
        while job.connection.poll():
            yield job.connection.recv()
    except (EOFError, OSError):
        job.process.join()
        yield "failed", ended(job.process.exitcode)
