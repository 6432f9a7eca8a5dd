"""A study from its definition to its figures: the functions that `ltm study` calls."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, cast

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import RECORDS, Records, compare, read_records
from ltm_pyro.inference.estimators import ESTIMATORS
from ltm_pyro.studies.budget import MAX_FLOPS, parse_budget
from ltm_pyro.studies.configure import Values, configure
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.definition import Definition, load_definition
from ltm_pyro.studies.search.plan import Plan, base_recipe, check_changes, check_plan
from ltm_pyro.studies.search.runner import Resources, Worker
from ltm_pyro.studies.search.storage import (
    check_destination,
    create_file,
    open_existing,
    open_storage,
    without_password,
)
from ltm_pyro.studies.search.watch import Watch
from ltm_pyro.training.recipe import dump_recipe
from ltm_pyro.training.trust import remember_file, remember_recipe
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write, new_folder, writing
from ltm_pyro.utils.limits import LARGEST_SEED

BASE = "base.yaml"
RUNS = Path("runs/studies")  # each study's trials in a folder of its name
BUDGET = "4e12flops"
TRIALS = 20  # if neither the user nor a grid says how many


def prepare(
    source: str, recipe: str | None, changes: Values, budget: str | None, trust: bool = False, **planned: Any
) -> tuple[Definition, Plan]:
    """A study's definition and plan, checked before anything is written.

    Args:
        source: a shipped study's name, or a Python file.
        recipe, changes: the base recipe (the study's own when not given), and what is changed in it.
        budget: what each trial may spend; `BUDGET` when not given.
        trust: lets the recipe of a run or of an export name code of others; the trials then train what it names.
        planned: the further fields of `Plan`.
    """
    definition = load_definition(source)
    check_changes(definition, changes, budget)
    text, pack = base_recipe(recipe or definition.recipe, changes, trust)
    plan = Plan(
        study=Path(source).stem,
        question=definition.question,
        space=definition.described,
        recipe=text,
        pack=pack,
        budget=budget or BUDGET,
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
    definition: Definition, plan: Plan, url: str, name: str, total: int, resources: Resources, repeats: int = 2
) -> None:
    """Works on a study until it has ``total`` trials, wherever they run; after an interruption the same call resumes.

    Args:
        url, name: of the storage, and of the study in it.
        repeats: how often the best setting is trained again, each time with another seed, beside the autoregressive
            baseline.
    """
    check_name(name)
    if name.endswith(trials.CHECKS):
        raise UsageError(f"'{name}' would be the checks of another study: choose another --study-name.")
    if plan.seed + total + repeats > LARGEST_SEED:  # a setting that is tried again has the next seed
        most = LARGEST_SEED - total - repeats
        raise UsageError(f"--seed is {plan.seed}, behind which no seeds are left: choose one of at most {most}.")
    check_destination(url, resources.out)
    create_file(url)
    with open_storage(url) as storage:
        study = trials.open_study(storage, name, plan)
        checks = trials.open_study(storage, name + trials.CHECKS, replace(plan, pruned=False))
        study.set_user_attr(trials.SOURCE, definition.source)
        remember_recipe(plan.recipe)  # the user's own from here on, for `ltm study best` and `ltm study report`
        if definition.source.endswith(".py"):
            remember_file(Path(definition.source))
        with writing(resources.out), new_folder(resources.out), atomic_write(resources.out / BASE) as new:
            new.write_text(plan.recipe, "utf-8")
        trials.enqueue(study, trials.first_points(definition, total))
        again: list[Values] = [{"role": "repeat", "repeat": 1 + index} for index in range(repeats)]
        roles = [{"role": "baseline"}, *again] if definition.checks else []
        done = sum(t.state.is_finished() for t in trials.current_trials(study)[:total])
        with Watch(name, total, done) as watch:
            Worker(study, checks, definition, plan, total, roles, resources, watch).run()


def summaries(url: str) -> list[dict[str, Any]]:
    """One row for every study in a storage."""
    with open_existing(url) as storage:
        return [_summary(storage, name) for name in trials.study_names(storage)]


def _summary(storage: RDBStorage, name: str) -> dict[str, Any]:
    study = trials.load_study(storage, name)
    states = [t.state for t in trials.current_trials(study)]
    chosen = trials.best_trial(study)
    return {
        "study": name,
        "trials": len(states),
        **{s.name.lower(): states.count(s) for s in (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)},
        "best": chosen.values[0] if chosen else None,
        "budget": trials.plan_of(study).budget,
    }


def describe(url: str, name: str | None, runs: Path | None = None) -> dict[str, Any]:
    """A study's plan, its trials, the checks of the best one, and what the study recommends.

    Args:
        runs: where the trials' runs are, by default in `RUNS`. Nothing outside is read, whatever the storage says.
    """
    with open_existing(url) as storage:
        study = trials.load_study(storage, only_name(storage, name))
        runs = RUNS / study.study_name if runs is None else runs
        plan = trials.plan_of(study)
        checks = trials.load_study(storage, study.study_name + trials.CHECKS)
        chosen = trials.best_trial(study)
        checked = trials.existing_checks(checks, chosen).values() if chosen else ()
        theirs = _documents(chosen, runs) if chosen and plan.minimise[0] in ESTIMATORS else []
        compared = [x for x in (*trials.feasible(study), *checked) if x != chosen and x.state == TrialState.COMPLETE]
        rows = [
            _row(trial)
            | (_above(_documents(trial, runs), theirs, plan.minimise[0]) if theirs and trial in compared else {})
            for trial in (*trials.current_trials(study), *checked)
        ]
        points_say = any(MAX_FLOPS in t.user_attrs.get(trials.SETTINGS, {}) for t in trials.current_trials(study))
    return {
        **plan.as_dict(),
        "study": study.study_name,
        "trials": rows,
        "each": "the FLOPs that its point says" if points_say else plan.budget,
        "best": chosen.number if chosen else None,
        "recommendation": recommend(rows, _row(chosen) if chosen else None, plan),
    }


def _row(trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    lost = "its worker died" if trial.state == TrialState.FAIL else None
    return {
        "number": trial.number,
        "role": attributes.get("role", "trial"),
        "state": trial.state.name.lower(),
        "seed": attributes.get(trials.SEED),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "parameters": dict(trial.params),
        "figures": attributes.get(trials.FIGURES, {}),
        "reason": attributes.get(trials.REASON, lost),
    }


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


def recommend(rows: list[dict[str, Any]], best: dict[str, Any] | None, plan: Plan) -> str:
    """The best setting in words, with its figure over fresh seeds and the autoregressive baseline's beside it.

    The figure of the best of N trials is optimistic, because the trial was chosen by it; the repeats' mean is not.
    """
    if best is None:
        return "No trial is complete and within its limits yet: nothing to recommend."
    name = plan.minimise[0]
    setting = ", ".join(
        f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in best["parameters"].items()
    )
    text = f"Trial {best['number']} has the lowest {name}, {best['figures'][name]:.4f}: {setting}."
    done = [row for row in rows if row["state"] == "complete"]
    again = [r["figures"][name] for r in done if r["role"] == "repeat"]
    if again:
        spread = f" ± {stdev(again):.4f} (standard deviation over {len(again)} seeds)" if len(again) > 1 else ""
        text += f" Trained again with other seeds: {mean(again):.4f}{spread}."
    ar_baseline = [r["figures"][name] for r in done if r["role"] == "baseline"]
    text += f" The autoregressive baseline at the same budget: {ar_baseline[0]:.4f}." if ar_baseline else ""
    text += _by_document(done, name) if name in ESTIMATORS else ""
    return text + _unequal([r["figures"]["flops"] for r in done if r["figures"].get("flops")], plan)


def _by_document(done: list[dict[str, Any]], name: str) -> str:
    """How far behind the best the others are, document by document, and which of them not for certain."""
    behind = sorted((row for row in done if "above_best" in row), key=lambda row: row["above_best"])
    others = [row for row in behind if row["role"] == "trial"]
    if not behind:
        lacking = "no figures by document are in the trials' folders, which --runs names"
        return f" No error is given for these differences: {lacking}." if len(done) > 1 else ""
    said = [f"trial {row['number']} by {_difference(row)}" for row in others[:1]]
    said += [f"the autoregressive baseline by {_difference(row)}" for row in behind if row["role"] == "baseline"]
    if not said:
        return ""
    text = f" Document by document, one seed each, above it: {', '.join(said)} (± a standard error)."
    unsure = [str(row["number"]) for row in others if row["above_best_p"] is None or row["above_best_p"] >= 0.05]
    return text + (f" Not told apart from it (p of 0.05 and more): {', '.join(unsure)}." if unsure else "")


def _difference(row: dict[str, Any]) -> str:
    error = row["above_best_stderr"]
    return f"{row['above_best']:+.4f}" + (" (one document)" if error is None else f" ± {error:.4f}")


def _unequal(flops: list[float], plan: Plan) -> str:
    """A warning if the same seconds bought unequal FLOPs, as on a machine with other work to do."""
    least, most = min(flops, default=0), max(flops, default=0)
    if parse_budget(plan.budget).unit != "s" or most < 1.5 * least:
        return ""
    return (
        f" The same {plan.budget} bought {least:.2g} to {most:.2g} FLOPs: if the machine had other work to do, the "
        f"comparison is not fair; a budget in FLOPs always is."
    )


def only_name(storage: RDBStorage, name: str | None) -> str:
    """The name, or that of the only study there is."""
    names = trials.study_names(storage)
    if name is None and len(names) != 1:
        there = ", ".join(names) or "no study"
        raise UsageError(f"{without_password(storage.url)} holds {there}: choose one with --study-name.")
    return check_name(name or names[0])


def check_name(name: str) -> str:
    """A study's name, of which files and folders are named; `UsageError` if they would be elsewhere than it says."""
    if not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}", name):
        raise UsageError(f"{name[:100]!r} names no study's files: take up to 100 characters, no slash, no dot first.")
    return name


def write_best(
    url: str, name: str | None, file: Path | None, number: int | None, force: bool, trust: bool = False
) -> dict[str, Any]:
    """Writes the recommended (or the numbered) trial as a recipe that ``ltm fit`` runs; returns its row.

    Others may have written to the storage: code of theirs that its recipe names needs ``trust``.
    """
    with open_existing(url) as storage:
        study = trials.load_study(storage, only_name(storage, name))
        plan = trials.plan_of(study)
        chosen = trials.best_trial(study) if number is None else _numbered(study, number)
    name = study.study_name
    if chosen is None:
        raise UsageError(
            f"No trial of '{name}' is complete and within its limits: run more; `ltm study show` says why."
        )
    file = file or Path(f"{name}-best.yaml")
    if file.exists() and not force:
        raise UsageError(f"{file} exists: choose another --out, or add --force.")
    place = {"run": f"runs/{name}-best", "seed_everything": chosen.user_attrs[trials.SEED]}
    options = parse_budget(plan.budget).settings | chosen.user_attrs[trials.SETTINGS] | place
    with base_file(plan) as base:
        text = dump_recipe(configure(str(base), options, own=False, trust=trust))
    title = f"# Trial {chosen.number} of the study '{name}': {plan.minimise[0]} {chosen.values[0]:.4f}."
    with writing(file), new_folder(file.parent), atomic_write(file) as new:
        new.write_text(f"{title}\n{text}", "utf-8")
    return _row(chosen) | {"recipe": str(file)}


def _numbered(study: optuna.Study, number: int) -> FrozenTrial:
    complete = {t.number: t for t in study.get_trials(states=(TrialState.COMPLETE,))}
    if number not in complete:
        raise UsageError(
            f"Trial {number} of '{study.study_name}' is not complete: `ltm study show` lists those that are."
        )
    return complete[number]
