"""A study from its definition to its figures: the functions that `ltm study` calls."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import RECORDS, Records, compare, read_records
from ltm_pyro.inference.estimators import ESTIMATORS
from ltm_pyro.studies.budget import MAX_FLOPS, parse_budget
from ltm_pyro.studies.configure import Values, configure
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.definition import Definition, grid_of, load_definition
from ltm_pyro.studies.search.objective import REFERENCES, write_references
from ltm_pyro.studies.search.plan import Plan, base_recipe, check_changes, check_plan
from ltm_pyro.studies.search.recommend import Verdict, comparable, decide, points_of, rounds
from ltm_pyro.studies.search.runner import BASE, Resources, Worker
from ltm_pyro.studies.search.storage import (
    Patient,
    check_destination,
    create_file,
    open_existing,
    open_storage,
)
from ltm_pyro.studies.search.watch import Watch
from ltm_pyro.studies.search.wording import as_dict, in_words, plus_minus, stderr_of
from ltm_pyro.training.recipe import dump_recipe
from ltm_pyro.training.trust import is_own_file, remember_file, remember_recipe
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write, new_folder, writing
from ltm_pyro.utils.limits import LARGEST_SEED

RUNS = Path("runs/studies")  # each study's trials in a folder of its name
BUDGET = "4e12flops"
TRIALS = 20  # if neither the user nor a grid says how many


def prepare(
    source: str,
    recipe: str | None,
    changes: Values,
    budget: str | None,
    trust: bool = False,
    references: Sequence[str] = (),
    **planned: Any,
) -> tuple[Definition, Plan]:
    """A study's definition and plan, checked before anything is written.

    Args:
        source: a shipped study's name, or a Python file.
        recipe, changes: the base recipe (the study's own when not given), and what is changed in it.
        budget: what each trial may spend; `BUDGET` when not given.
        trust: lets the recipe of a run or of an export name code of others; the trials then train what it names.
        references: the runs that are floor and ceiling of the context recovered, if they are trained ones.
        planned: the further fields of `Plan`.
    """
    definition = load_definition(source)
    if planned.get("sampler") == "grid" and not definition.points:
        definition = grid_of(definition)
    check_changes(definition, changes, budget)
    text, pack = base_recipe(recipe or definition.recipe, changes, trust)
    plan = Plan(
        study=Path(source).stem,
        question=definition.question,
        space=definition.described,
        recipe=text,
        pack=pack,
        budget=budget or BUDGET,
        references=tuple(str(Path(place).expanduser().resolve()) for place in references),
        **planned,
    )
    with base_file(plan) as file:
        check_plan(plan, definition, file)
    return definition, plan


@contextmanager
def base_file(plan: Plan) -> Iterator[Path]:
    """The base recipe as a file, for as long as the context lasts."""
    with TemporaryDirectory() as scratch:
        (Path(scratch) / BASE).write_text(plan.recipe, "utf-8")
        yield Path(scratch) / BASE


def run_study(
    definition: Definition,
    plan: Plan,
    url: str,
    name: str,
    total: int,
    resources: Resources,
    repeats: int = 7,
    finalists: int = 4,
    warm_start: str | None = None,
) -> None:
    """Works on a study until it has ``total`` trials, wherever they run; after an interruption the same call resumes.

    Args:
        url, name: of the storage, and of the study in it.
        repeats, finalists: with how many fresh seeds the best settings are trained again at most, and how many of them
            (see `wanted_repeats`), beside the autoregressive baseline.
        warm_start: another study of the storage, whose five best points are tried first.
    """
    check_name(name)
    if name.endswith(trials.CHECKS):
        raise UsageError(f"'{name}' would be the checks of another study: choose another --study-name.")
    if plan.seed + total + repeats > LARGEST_SEED:  # a setting that is tried again has the next seed
        most = LARGEST_SEED - total - repeats
        raise UsageError(f"--seed is {plan.seed}, behind which no seeds are left: choose one of at most {most}.")
    trials.first_points(definition, total)
    check_destination(url, resources.out)
    create_file(url)
    with open_storage(url) as storage:
        known = _best_points(storage, warm_start, definition) if warm_start else ()
        study = trials.open_study(storage, name, plan)
        checks = trials.open_study(storage, name + trials.CHECKS, replace(plan, pruner="none"))
        study.set_user_attr(trials.SOURCE, definition.source)
        study.set_user_attr(trials.RULE, [finalists, repeats, total])
        remember_recipe(plan.recipe)  # the user's own from here on, for `ltm study best` and `ltm study report`
        if definition.source.endswith(".py"):
            remember_file(Path(definition.source))
        trials.enqueue(study, trials.first_points(definition, total, known))
        done = sum(t.state.is_finished() for t in trials.counted_trials(study, total))
        with Watch(name, total, done) as watch:
            worker = Worker(
                study=study,
                checks=checks,
                definition=definition,
                plan=plan,
                total=total,
                finalists=finalists,
                repeats=repeats,
                resources=resources,
                watch=watch,
            )
            worker.write_base(anew=True)
            if plan.references and not all(read_records(resources.out / part) for part in REFERENCES):
                write_references(resources.out, plan.references, plan.limit)
            checked = 1 + sum(trained(finalists, repeats)) if definition.checks else 0
            points: Sequence[Values] = (definition.points or [{}] * total)[done:total]
            ahead = [definition.options(point).get(MAX_FLOPS) if point else None for point in points]
            watch.say(estimate(study, plan, ahead, checked, resources.workers))
            worker.patient = Patient(storage, url, worker.listen, worker.liveness.forget)
            worker.run()


def _best_points(storage: BaseStorage, name: str, definition: Definition, most: int = 5) -> list[Values]:
    """The best points of another study that are points of this one."""
    study = trials.load_study(storage, check_name(name))
    plan = trials.plan_of(study)
    found = comparable(points_of([trials.row(t, plan) for t in trials.current_trials(study)], *plan.objectives[0]))
    points = [dict(point.parameters) for point in found if definition.has(dict(point.parameters))][:most]
    if not points:
        raise UsageError(f"No complete trial of '{name}' is in the space of this study: leave --warm-start out.")
    return points


def trained(finalists: int, repeats: int) -> list[int]:
    """The trainings of every round of repeats."""
    before, found = 0, []
    for keep, seeds in rounds(finalists, repeats) if repeats else ():
        found.append(keep * (seeds - before))
        before = seeds
    return found


def estimate(study: optuna.Study, plan: Plan, ahead: Sequence[float | None], checked: int, workers: int) -> str:
    """What is ahead, in words: trainings, their FLOPs, and the time they will take, once trials have told.

    Args:
        ahead: of every trial of the search that is left, the FLOPs that its point says, if it does.
        checked: the trainings that check the best settings.
    """
    budget, searched = parse_budget(plan.budget), len(ahead)
    count, flops = searched + checked, sum(x or budget.amount for x in ahead) + checked * budget.amount
    told = [t.duration.total_seconds() for t in trials.feasible(study) if t.duration and trials.is_ours(t)]
    each = budget.amount if budget.unit == "s" else mean(told) if told else None
    text = f"At most {searched} trials and {checked} checks are ahead, {workers} at a time here"
    text += f", {flops:.2g} FLOPs in all" if budget.unit == "flops" else ""
    if each is None:
        return f"{text}; how long they take is known after the first."
    at_least = "at least " if budget.unit == "s" and not told else ""
    return f"{text}: {at_least}about {timedelta(seconds=round(count * each / workers))} if nobody else works on them."


def summaries(url: str) -> list[dict[str, Any]]:
    """One row for every study in a storage."""
    with open_existing(url) as storage:
        return [_summary(storage, name) for name in trials.study_names(storage)]


def _summary(storage: BaseStorage, name: str) -> dict[str, Any]:
    study = trials.load_study(storage, name)
    states = [t.state for t in trials.current_trials(study)]
    done = [t.values[0] for t in trials.feasible(study)]
    plan = trials.plan_of(study)
    return {
        "study": name,
        "trials": len(states),
        **{s.name.lower(): states.count(s) for s in (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)},
        "best": (min(done) if plan.objectives[0][1] > 0 else max(done)) if done else None,
        "budget": plan.budget,
    }


def describe(url: str, name: str | None, runs: Path | None = None) -> dict[str, Any]:
    """A study's plan, its trials, the checks of the best ones, and what the study recommends.

    Args:
        runs: where the trials' runs are, by default in `RUNS`. Nothing outside is read, whatever the storage says.
    """
    with open_existing(url) as storage:
        study = trials.load_study(storage, only_name(storage, name))
        runs = RUNS / study.study_name if runs is None else runs
        plan = trials.plan_of(study)
        checks = trials.load_study(storage, study.study_name + trials.CHECKS)
        searched, verdict = trials.current_trials(study), recommended(study, checks, plan)
        checked = _checks_that_count(study, checks, plan)
        every = [*searched, *checked]
        chosen = next((t for t in searched if verdict and t.number == verdict.best.number), None)
        theirs = _documents(chosen, runs) if chosen and plan.objectives[0][0] in ESTIMATORS else []
        compared = [x for x in every if x is not chosen and x.state == TrialState.COMPLETE]
        rows = [
            trials.row(t, plan)
            | (_above(_documents(t, runs), theirs, plan.objectives[0][0]) if theirs and t in compared else {})
            for t in every
        ]
        front = sorted(t.number for t in _front(study)) if len(plan.objectives) > 1 else []
    points_say = any(row["max_flops"] for row in rows)
    return {
        **plan.as_dict(),
        "study": study.study_name,
        "trials": rows,
        "each": "the FLOPs that its point says" if points_say else plan.budget,
        "best": verdict.best.number if verdict else None,
        "recommended": verdict and as_dict(verdict, plan.objectives[0][1]),
        "front": front,
        "recommendation": in_words(rows, verdict, plan),
    }


def recommended(study: optuna.Study, checks: optuna.Study, plan: Plan) -> Verdict | None:
    """What a study recommends; None without a complete trial within its limits."""
    existing = trials.existing_checks(checks)
    rows = [trials.row(t, plan) for t in (*trials.current_trials(study), *existing.values())]
    finalists, repeats, total = study.user_attrs.get(trials.RULE, (1, 0, len(study.get_trials(deepcopy=False))))
    finalists = finalists if len(plan.objectives) == 1 else 1
    searching = any(not t.state.is_finished() for t in trials.counted_trials(study, total))

    def is_done(of: int, repeat: int) -> bool:
        check = existing.get(("repeat", of, repeat))
        return check is not None and check.state.is_finished()

    has_checks = any(role == "repeat" for role, _, _ in existing)
    verdict = decide(points_of(rows, *plan.objectives[0]), finalists, repeats if has_checks else 0, is_done)
    return verdict and verdict._replace(is_final=verdict.is_final and not searching)


def _checks_that_count(study: optuna.Study, checks: optuna.Study, plan: Plan) -> list[FrozenTrial]:
    """The checks of settings that the search still holds for its best, the baseline first."""
    rows = [trials.row(t, plan) for t in trials.current_trials(study)]
    finalists = study.user_attrs.get(trials.RULE, (1,))[0]
    numbers = [point.number for point in comparable(points_of(rows, *plan.objectives[0]))][:finalists]
    found = trials.existing_checks(checks).values()
    kept = [t for t in found if t.user_attrs["of"] in numbers]
    return sorted(kept, key=lambda t: (t.user_attrs["role"] != "baseline", numbers.index(t.user_attrs["of"])))


def _front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials within their limits than which no other is better in every objective."""
    signs = [1 if d == StudyDirection.MINIMIZE else -1 for d in study.directions]
    done = {t.number: [s * x for s, x in zip(signs, t.values, strict=True)] for t in trials.feasible(study)}

    def is_beaten(number: int) -> bool:
        mine = done[number]
        return any(x != mine and all(a <= b for a, b in zip(x, mine, strict=True)) for x in done.values())

    return [t for t in trials.feasible(study) if not is_beaten(t.number)]


def _documents(trial: FrozenTrial, runs: Path) -> Records:
    """A trial's figures by document; none if its folder is not in ``runs``, or another program has added it.

    Of the path that the storage names only the last part counts, and no link is followed: a storage is data.
    """
    name = Path(str(trial.user_attrs.get(trials.RUN, ""))).name
    folder = runs.resolve() / name
    inside = re.fullmatch(r"(trial|check)-[0-9]{1,9}", name) and (folder / RECORDS).resolve() == folder / RECORDS
    return read_records(folder) if inside else []


def _above(own: Records, theirs: Records, figure: str) -> dict[str, float | None]:
    """By how much a trial's figure is above ``theirs``, paired by document; {} without figures by document."""
    try:
        found = compare(own, theirs, figure)
    except UsageError:
        return {}
    figures = {"above_best": found.value, "above_best_stderr": found.stderr, "above_best_p": found.p_value}
    return cast(dict[str, float | None], finite(figures))  # one document has no error


def only_name(storage: BaseStorage, name: str | None) -> str:
    """The name, or that of the only study there is."""
    names = trials.study_names(storage)
    if name is None and len(names) != 1:
        there = ", ".join(names) or "no study"
        raise UsageError(f"The storage holds {there}: choose one with --study-name.")
    return check_name(name or names[0])


def check_name(name: str) -> str:
    """A study's name, of which files and folders are named; `UsageError` if they would be elsewhere than it says."""
    if not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}", name):
        raise UsageError(f"{name[:100]!r} names no study's files: take up to 100 characters, no slash, no dot first.")
    return name


def write_best(
    url: str,
    name: str | None,
    file: Path | None,
    number: int | None,
    force: bool,
    trust: bool = False,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Writes the recommended (or the numbered) trial as a recipe that ``ltm fit`` runs; returns its row.

    ``weights`` choose among the trials of a Pareto front that with the least weighted sum of its objectives. Others may
    have written to the storage: code of theirs that its recipe names needs ``trust``.
    """
    with open_existing(url) as storage:
        study = trials.load_study(storage, only_name(storage, name))
        plan = trials.plan_of(study)
        checks = trials.load_study(storage, study.study_name + trials.CHECKS)
        verdict = recommended(study, checks, plan)
        if number is None and weights:
            number = _by_weight(_front(study), plan, weights)
        if number is None and verdict:
            number = verdict.best.number
        chosen = None if number is None else _numbered(study, number)
        source = str(study.user_attrs.get(trials.SOURCE, ""))
    name = study.study_name
    if chosen is None:
        raise UsageError(
            f"No trial of '{name}' is complete and within its limits: run more; `ltm study show` says why."
        )
    file = file or Path(f"{name}-best.yaml")
    if file.exists() and not force:
        raise UsageError(f"{file} exists: choose another --out, or add --force.")
    row, attributes = trials.row(chosen, plan), chosen.user_attrs
    settings = attributes.get(trials.SETTINGS)
    if settings is None:  # of a trial that was added through Optuna
        settings = _settings_of(chosen, source, trust)
    place = {"run": f"runs/{name}-best", "seed_everything": attributes.get(trials.SEED, plan.seed)}
    options = parse_budget(plan.budget).settings | settings | place
    with base_file(plan) as base:
        text = dump_recipe(configure(str(base), options, own=False, trust=trust))
    figure, sign = plan.objectives[0]
    told = verdict.best if verdict and verdict.best.number == chosen.number else None
    if told and told.repeated:
        found, error, seeds = sign * told.mean, stderr_of(told), len(told.repeated)
        row |= {"repeats": {"seeds": seeds, "mean": found, "stderr": error}}
        said = f"{figure} {found:.4f}{plus_minus(error)}, the mean over {seeds} fresh seeds"
    else:
        said = f"{figure} {chosen.values[0]:.4f}, one seed, by which it may have been chosen"
    title = f"# Trial {chosen.number} of the study '{name}': {said}."
    with writing(file), new_folder(file.parent), atomic_write(file) as new:
        new.write_text(f"{title}\n{text}", "utf-8")
    return row | {"recipe": str(file)}


def _by_weight(front: list[FrozenTrial], plan: Plan, weights: Mapping[str, float]) -> int | None:
    names = [name for name, _ in plan.objectives]
    if unknown := weights.keys() - {*names}:
        raise UsageError(f"--weight names {min(unknown)!r}, which is no objective: choose from {', '.join(names)}.")

    def total(trial: FrozenTrial) -> float:
        pairs = zip(plan.objectives, trial.values, strict=True)
        return sum(sign * value * weights.get(name, 0.0) for (name, sign), value in pairs)

    return min(front, key=total).number if front else None


def _settings_of(trial: FrozenTrial, source: str, trust: bool) -> Values:
    """The recipe settings of a trial that others have added, by the study's own definition."""
    if source.endswith(".py") and not trust and not is_own_file(Path(source)):
        raise UsageError(
            f"Trial {trial.number} was added by another program, and what it sets is said by code in {source}: read "
            f"it, then add --trust."
        )
    definition = load_definition(source)
    if wrong := definition.misfit(trial.params):
        raise UsageError(f"Trial {trial.number} was added by another program, and is none of the space: {wrong}.")
    return definition.options(trial.params)


def _numbered(study: optuna.Study, number: int) -> FrozenTrial:
    complete = {t.number: t for t in study.get_trials(states=(TrialState.COMPLETE,))}
    if number not in complete:
        raise UsageError(
            f"Trial {number} of '{study.study_name}' is not complete: `ltm study show` lists those that are."
        )
    return complete[number]
