"""Which setting a study recommends, and whether its lead is more than luck.

The seed is the replicate. The search proposes; the points that look best there are trained again with seeds that the
search has not used, the same ones for all of them, in rounds whose sizes are fixed beforehand. Only these fresh seeds
decide, because the best of N trials was chosen by its figure.

Shapes: M points, R seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from ltm_pyro.utils.statistics import Estimate, clustered_mean

LEVEL = 0.03  # of the one comparison, two-sided, by which a winner is named: below the intervals' 5 %
FEWEST = 3  # seeds, from which on an interval is given
COST = "inference_flops_per_token"
Row = Mapping[str, Any]  # see `trials.row`


class Point(NamedTuple):
    """A setting and its objective under every seed, such that less is better.

    ``number`` is the first trial of it, ``repeated`` has the fresh seeds, by the repeat's number, and ``max_flops`` is
    the budget that the setting itself says, if it does.
    """

    number: int
    parameters: Mapping[str, Any]
    searched: dict[int, float]
    repeated: dict[int, float]
    cost: float = math.nan
    max_flops: float | None = None

    @property
    def values(self) -> dict[int, float]:
        """The fresh seeds' figures; those of the search where there are none."""
        return self.repeated or self.searched

    @property
    def mean(self) -> float:
        """Over the seeds of `values`."""
        return mean(self.values.values())


class Lead(NamedTuple):
    """By how much a point is behind the best one, over the seeds that both have."""

    point: Point
    seeds: int
    behind: Estimate

    @property
    def is_established(self) -> bool:
        """Whether the difference is more than luck, at `LEVEL`, from `FEWEST` seeds on."""
        return self.seeds >= FEWEST and self.behind.value > 0 and self.behind.p_value < LEVEL


class Verdict(NamedTuple):
    """The recommended point, and its lead over the others of the last round.

    ``is_final`` says that every repeat that the rule wants is done; before, no winner is named.
    """

    best: Point
    leads: tuple[Lead, ...]
    is_final: bool

    @property
    def is_established(self) -> bool:
        """Whether the best point is named as the winner."""
        return self.is_final and bool(self.leads) and all(lead.is_established for lead in self.leads)

    @property
    def equal(self) -> list[Point]:
        """The best point and those that it is not told apart from."""
        return [self.best, *(lead.point for lead in self.leads if not lead.is_established)]

    @property
    def cheapest(self) -> Point:
        """Of the equal ones that whose inference costs least; the best one where costs are not known, or the same."""
        return min(self.equal, key=lambda point: math.inf if math.isnan(point.cost) else point.cost)


def points_of(rows: Sequence[Row], objective: str, sign: int = 1) -> list[Point]:
    """The points of a study, each with all trials of it that are complete and within their limits.

    Args:
        rows: of the search and of the checks.
        objective, sign: the figure that decides; −1 where more is better.
    """
    found: dict[str, Point] = {}
    outside: set[str] = set()
    of: dict[int, str] = {}
    done = [row for row in rows if row["state"] == "complete"]
    for row in (row for row in done if row["role"] in ("trial", "added")):
        name = of[row["number"]] = repr(sorted(row["parameters"].items()))
        cost = row["figures"].get(COST)
        new = Point(row["number"], row["parameters"], {}, {}, math.nan if cost is None else cost, row["max_flops"])
        point = found.setdefault(name, new)
        seed = -1 - row["number"] if row["seed"] is None else row["seed"]
        point.searched[seed] = sign * row["figures"][objective]
        outside |= set() if row["within_limits"] else {name}
    for row in (row for row in done if row["role"] == "repeat" and row["of"] in of):
        found[of[row["of"]]].repeated[row["repeat"]] = sign * row["figures"][objective]
        outside |= set() if row["within_limits"] else {of[row["of"]]}
    return [point for name, point in found.items() if name not in outside]


def comparable(points: Sequence[Point]) -> list[Point]:
    """The points of the largest budget, best first by the search: across budgets there is no lowest figure."""
    most = max((point.max_flops or 0.0 for point in points), default=0.0)
    kept = [point for point in points if (point.max_flops or 0.0) == most]
    return sorted(kept, key=lambda point: (mean(point.searched.values()), point.number))


def rounds(finalists: int, repeats: int) -> list[tuple[int, int]]:
    """How many points go on, and how many fresh seeds each has at the end of a round: halved until two are left.

    Four points and seven seeds: all four to two seeds, then the better two to seven.
    """
    count = max(1, math.ceil(math.log2(finalists))) if finalists > 1 else 1
    seeds = [max(1, round(repeats * (i + 1) / (count + 1))) for i in range(count - 1)]
    return [(math.ceil(finalists / 2**i), upto) for i, upto in enumerate([*seeds, repeats])]


def wanted_repeats(
    points: Sequence[Point], finalists: int, repeats: int, is_done: Callable[[int, int], bool]
) -> tuple[list[tuple[int, int]], list[Point]]:
    """The repeats that the rule wants so far, (trial's number, repeat), and the points that are in its last round.

    A round begins when every repeat of the one before is done, whatever became of it. The rule knows neither p-values
    nor how large a difference is, so that nobody can repeat until something stands out.

    Args:
        points: as `comparable` sorts them.
        is_done: whether a repeat is finished.
    """
    wanted: list[tuple[int, int]] = []
    left, before = list(points[:finalists]), 0
    if not left or repeats < 1:
        return [], left
    for keep, seeds in rounds(len(left), repeats):
        if before:  # by what that round knew, or a later seed would change who is in this one
            known = {p.number: [y for repeat, y in p.repeated.items() if repeat <= before] for p in left}
            left = sorted((p for p in left if known[p.number]), key=lambda p: mean(known[p.number]))[:keep]
        now = [(point.number, repeat) for point in left for repeat in range(1, seeds + 1)]
        wanted += [pair for pair in now if pair not in wanted]
        if not all(is_done(*pair) for pair in now):
            break
        before = seeds
    return wanted, left


def decide(
    points: Sequence[Point], finalists: int, repeats: int, is_done: Callable[[int, int], bool]
) -> Verdict | None:
    r"""The best point by its mean over fresh seeds, and its lead, paired by seed; None without a complete trial.

    .. math:: d_r = y_r(\text{other}) - y_r(\text{best}), \qquad \bar d \pm t_{R - 1} \, \mathrm{se}(\bar d)

    A winner is named if it is ahead of every other point of the last round at `LEVEL` (two-sided). No further
    correction is due: to name a wrong point, the truly best one would have to be beaten at that level as well. Without
    fresh seeds the seeds of a grid decide, where its points share at least three.

    Source: Gutmann & Maymin (1987), Is the selected population the best?; Jamieson & Talwalkar (2016) for halving.
    """
    ranked = comparable(points)
    if not ranked:
        return None
    wanted, left = wanted_repeats(ranked, finalists, repeats, is_done)
    again = [point for point in left if point.repeated]
    final = all(is_done(*pair) for pair in wanted)
    if not again:
        final = final and not wanted
        again = [point for point in ranked if len(ranked[0].searched) >= FEWEST <= len(point.searched)] or ranked[:1]
    best = min(again, key=lambda point: point.mean)
    leads = tuple(_lead(best, point) for point in again if point != best)
    return Verdict(best, tuple(sorted(leads, key=lambda lead: lead.behind.value)), final)


def _lead(best: Point, other: Point) -> Lead:
    seeds = sorted(best.values.keys() & other.values.keys())
    if not seeds:
        nothing = Estimate(other.mean - best.mean, math.nan, (math.nan, math.nan), math.nan)
        return Lead(other, 0, nothing)
    return Lead(other, len(seeds), clustered_mean(np.array([other.values[s] - best.values[s] for s in seeds])))
