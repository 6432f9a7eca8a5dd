"""What a study recommends, in words and as plain data."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from ltm_pyro.inference.estimators import ESTIMATORS
from ltm_pyro.studies.budget import unequal_spends
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.recommend import FEWEST, Lead, Point, Row, Verdict, comparable, points_of
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.statistics import standard_error

EDGE = 0.02  # of a parameter's range


def stderr_of(point: Point) -> float | None:
    """The standard error of a point's mean over seeds; None for one seed."""
    found: float | None = finite(float(standard_error(np.array([*point.values.values()]))))
    return found


def plus_minus(stderr: float | None) -> str:
    """A standard error behind a figure; "" where there is none."""
    return "" if stderr is None else f" ± {stderr:.4f}"


def as_dict(verdict: Verdict, sign: int) -> dict[str, Any]:
    """A verdict as plain data, its figures with their own sign."""
    point = verdict.best
    leads = [
        {
            "trial": lead.point.number,
            "seeds": lead.seeds,
            "behind": lead.behind.value,
            "stderr": lead.behind.stderr,
            "interval": list(lead.behind.interval),
            "p": lead.behind.p_value,
            "is_established": lead.is_established,
        }
        for lead in verdict.leads
    ]
    found: dict[str, Any] = finite(
        {
            "trial": point.number,
            "mean": sign * point.mean,
            "stderr": stderr_of(point),
            "seeds": len(point.values),
            "fresh_seeds": bool(point.repeated),
            "is_established": verdict.is_established,
            "equal": [x.number for x in verdict.equal],
            "cheapest": verdict.cheapest.number,
            "leads": leads,
        }
    )
    return found


def in_words(rows: list[dict[str, Any]], verdict: Verdict | None, plan: Plan) -> str:
    """The recommended setting, its mean over seeds with its error, its lead, and what else a reader has to know."""
    if verdict is None:
        return "No trial is complete and within its limits yet: nothing to recommend."
    (name, sign), best = plan.objectives[0], verdict.best
    done = [row for row in rows if row["state"] == "complete"]
    text = _setting(best, verdict, name, sign)
    text += _leads(verdict)
    text += _across_budgets(rows, name, sign)
    ar_baseline = [r["figures"][name] for r in done if r["role"] == "baseline" and r["of"] == best.number]
    ar_baseline = ar_baseline or [r["figures"][name] for r in done if r["role"] == "baseline"]
    text += f" The autoregressive baseline at the same budget: {ar_baseline[0]:.4f}." if ar_baseline else ""
    text += _by_document(done, name) if name in ESTIMATORS else ""
    text += _at_the_edge(best.parameters, plan.space)
    if name == "bound" and any("prior" in key.split(".") for key in best.parameters):
        text += (
            " A bound is the prior's figure and the guide's gap together: compare priors by evidence "
            "(--minimise ais) before one is called better."
        )
    spent = [r["figures"]["flops"] for r in done if r["figures"].get("flops") and not r["max_flops"]]
    return text + unequal_spends(spent, plan.budget)


def _setting(best: Point, verdict: Verdict, name: str, sign: int) -> str:
    setting = ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in best.parameters.items())
    figure = f"{name} {sign * best.mean:.4f}{plus_minus(stderr_of(best))}"
    if best.repeated:
        searched = sign * mean(best.searched.values())
        seeds = "one fresh seed" if len(best.repeated) == 1 else f"the mean over {len(best.repeated)} fresh seeds"
        told = f"{figure} ({seeds}; {searched:.4f} in the search, by which it was chosen)"
    elif len(best.values) > 1:
        told = f"{figure} (the mean over {len(best.values)} seeds)"
    else:
        told = f"{figure} (one seed, by which it was chosen)"
    at = f" at {best.max_flops:.3g} FLOPs" if best.max_flops else ""
    return f"Recommended{at}: trial {best.number}, {told}: {setting}."


def _leads(verdict: Verdict) -> str:
    if not verdict.leads:
        return " No other setting has been trained with the same seeds: that it is the best is not established."
    if verdict.is_established:
        return f" It is ahead of {_behind(verdict.leads[0])}: established."
    if not verdict.is_final:
        return f" So far ahead of {_behind(verdict.leads[0])}; the repeats are not complete, and no winner is named."
    few = min(lead.seeds for lead in verdict.leads)
    why = f"; an interval needs {FEWEST} seeds" if few < FEWEST else ""
    equal = ", ".join(str(point.number) for point in verdict.equal)
    text = f" It is not established that it is the best: ahead of {_behind(verdict.leads[0])}{why}. Equal: {equal}"
    if verdict.cheapest != verdict.best:
        return f"{text}; the cheapest of them is {verdict.cheapest.number} (`ltm study best --trial`)."
    return f"{text}."


def _behind(lead: Lead) -> str:
    low, high = lead.behind.interval
    interval = f" (95 % interval {low:+.4f} to {high:+.4f}, {lead.seeds} seeds, paired)" if lead.seeds >= FEWEST else ""
    return f"trial {lead.point.number} by {lead.behind.value:.4f}{interval}"


def _across_budgets(rows: Sequence[Row], name: str, sign: int) -> str:
    """The best point of every smaller budget; figures of different budgets are not compared."""
    points = points_of(rows, name, sign)
    budgets = sorted({point.max_flops for point in points if point.max_flops})[:-1]
    best = [comparable([point for point in points if point.max_flops == flops])[0] for flops in budgets]
    said = [f"{x.max_flops:.3g} FLOPs: trial {x.number}, {sign * x.mean:.4f} ({_seeds(x)})" for x in best]
    return f" Best at the smaller budgets: {'; '.join(said)}." if said else ""


def _at_the_edge(parameters: Mapping[str, Any], space: Mapping[str, Any]) -> str:
    """A hint for every number that is at the edge of its range: the best may be beyond."""
    said = []
    for name, value in parameters.items():
        about = space.get(name, {}).get("attributes", {}) if isinstance(space.get(name), dict) else {}
        low, high = about.get("low"), about.get("high")
        if low is None or high is None or low == high or not isinstance(value, int | float):
            continue
        if about.get("log") and value <= 0:  # of a trial that others have added
            continue
        ends = np.log([low, high, value]) if about.get("log") else np.array([low, high, value], float)
        at = (ends[2] - ends[0]) / (ends[1] - ends[0])
        if at <= EDGE or at >= 1 - EDGE:
            said.append(
                f"{name} = {value:.4g} is at the {'lower' if at <= EDGE else 'upper'} edge of {low:g} to {high:g}"
            )
    return f" {'; '.join(said)}: widen the space, the best may be beyond." if said else ""


def _by_document(done: list[dict[str, Any]], name: str) -> str:
    """How far behind the best the others are, document by document, and which of them not for certain."""
    behind = sorted((row for row in done if "above_best" in row), key=lambda row: row["above_best"])
    others = [row for row in behind if row["role"] == "trial"]
    if not behind:
        lacking = "no figures by document are in the trials' folders, which --runs names"
        return f" No error by document is given for these differences: {lacking}." if len(done) > 1 else ""
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


def _seeds(point: Point) -> str:
    return "one seed" if len(point.values) == 1 else f"{len(point.values)} seeds"
