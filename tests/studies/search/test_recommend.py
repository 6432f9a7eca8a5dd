"""The rule that names a winner, on objectives with known truth and known noise: nothing is trained."""

import math

import numpy as np
import pytest

from ltm_pyro.studies.search.recommend import comparable, decide, points_of, rounds, wanted_repeats
from tests.studies.search.conftest import trial

STUDIES = 100
FINALISTS, REPEATS = 4, 7  # what `ltm study run` does without further options


def finish(rows, truth, draw, repeats=REPEATS, spread=2.0):
    """Runs every repeat that the rule wants, each with noise of variance 1 and a part that all share with its seed."""
    shared, done = draw.normal(0, spread, repeats + 1), set()
    by_number = {row["number"]: row["parameters"]["x"] for row in rows}
    while True:
        points = comparable(points_of(rows, "bound"))
        wanted, _ = wanted_repeats(points, FINALISTS, repeats, lambda *pair: pair in done)
        missing = [pair for pair in wanted if pair not in done]
        if not missing:
            return decide(points_of(rows, "bound"), FINALISTS, repeats, lambda *pair: pair in done)
        for of, repeat in missing:
            value = truth[by_number[of]] + shared[repeat] + draw.normal()
            rows.append(trial(-1, None, value, 9 + repeat, role="repeat", of=of, repeat=repeat))
            done.add((of, repeat))


def searched(truth, draw, seeds=1, spread=2.0):
    """A grid: every x once under every seed, each with noise of variance 1 and a part that all share with its seed."""
    rows = []
    for seed in range(seeds):
        shared = draw.normal(0, spread)
        rows += [trial(len(rows) + i, i, truth[i] + shared + draw.normal(), seed) for i in draw.permutation(len(truth))]
    for number, row in enumerate(rows):
        row["number"] = number
    return rows


def named(truth, seeds=1, repeats=REPEATS):
    """How many of 100 studies name the right winner (x = 0), how many a wrong one, and how many none."""
    right = wrong = 0
    for study in range(STUDIES):
        draw = np.random.default_rng(study)
        verdict = finish(searched(truth, draw, seeds), truth, draw, repeats)
        if verdict.is_established:
            right += verdict.best.parameters["x"] == 0
            wrong += verdict.best.parameters["x"] != 0
    return right, wrong, STUDIES - right - wrong


def in_stderrs(gaps, repeats=REPEATS):
    """Truths whose differences are so many standard errors of a paired mean over the repeats."""
    return math.sqrt(2 / repeats) * np.array(gaps, float)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_winner_is_named_where_there_is_one(seeds):
    right, wrong, _ = named(in_stderrs([0, 4, 6, 8, 8, 10, 10, 12, 12, 14]), seeds)
    assert right >= 80
    assert wrong <= 5


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("gaps", [[0] * 8, [0, 0, 6, 8, 8, 10]], ids=["all alike", "two alike"])
def test_no_winner_is_named_where_there_is_none(gaps, seeds):
    _, _, none = named(in_stderrs(gaps), seeds)
    assert none >= 95


def test_seeds_of_a_grid_decide_where_nothing_is_repeated():
    right, wrong, _ = named(in_stderrs([0, 4, 8, 8], 6), seeds=6, repeats=0)
    assert right >= 80
    assert wrong <= 5
    assert named(in_stderrs([0, 0, 8], 6), seeds=6, repeats=0)[2] >= 95


@pytest.mark.parametrize("seeds", [1, 3])
def test_over_a_continuous_space_the_recommendation_is_as_good_as_the_best_that_was_repeated(seeds):
    """Its regret, within a standard error of what the seeds can tell apart; far below the luckiest single draw's."""
    good, regret, of_the_luckiest = 0, [], []
    for study in range(STUDIES):
        draw = np.random.default_rng(study)
        truth = 16 * (draw.uniform(-2, 2, 20) - 0.3) ** 2  # 20 places in a valley
        rows = searched(truth, draw, seeds)
        luckiest = min(rows, key=lambda row: row["figures"]["bound"])["parameters"]["x"]
        verdict = finish(rows, truth, draw)
        chosen = truth[verdict.best.parameters["x"]]
        repeated = [truth[point.parameters["x"]] for point in points_of(rows, "bound") if point.repeated]
        assert len(repeated) == FINALISTS
        good += chosen <= min(repeated) + math.sqrt(2 / REPEATS)
        regret.append(chosen - truth.min())
        of_the_luckiest.append(truth[luckiest] - truth.min())
    assert good >= 90
    assert np.mean(regret) < (0.6 if seeds == 1 else 1) * np.mean(of_the_luckiest)


def test_a_lucky_seed_does_not_win():
    rows = [trial(i, "ABB"[i > 2] if i < 3 else "B", y, i % 3) for i, y in enumerate((5.0, 6.0, 6.0, 5.1, 5.1, 5.1))]
    verdict = decide(points_of(rows, "bound"), FINALISTS, 0, lambda of, repeat: False)
    assert (verdict.best.parameters["x"], verdict.best.mean) == ("B", pytest.approx(5.1))
    (lead,) = verdict.leads
    assert (lead.seeds, lead.behind.value) == (3, pytest.approx(17 / 3 - 5.1))
    assert not verdict.is_established


def test_more_is_better_where_it_is_to_be():
    rows = [trial(0, "A", 0.1), trial(1, "B", 0.7)]
    assert decide(points_of(rows, "bound", -1), 1, 0, lambda of, repeat: False).best.number == 1


def test_no_figure_is_compared_across_budgets():
    rows = [trial(0, "A", 9.0, max_flops=1e9), trial(1, "B", 3.0, max_flops=1e8), trial(2, "C", 9.5, max_flops=1e9)]
    assert [point.number for point in comparable(points_of(rows, "bound"))] == [0, 2]


def test_of_equal_settings_the_cheapest_is_named():
    rows = [
        trial(i, i, 1.0 + 0.1 * i, figures={"bound": 1.0 + 0.1 * i, "inference_flops_per_token": 9 - i}) for i in (0, 1)
    ]
    values = {0: [1.0, 1.2, 1.1], 1: [1.1, 1.1, 1.2]}
    for of, those in values.items():
        rows += [trial(-1, None, y, role="repeat", of=of, repeat=r) for r, y in enumerate(those, 1)]
    verdict = decide(points_of(rows, "bound"), 2, 3, lambda of, repeat: True)
    assert (verdict.best.number, verdict.cheapest.number) == (0, 1)
    assert [point.number for point in verdict.equal] == [0, 1]


def test_the_rounds_are_fixed_beforehand():
    assert rounds(4, 7) == [(4, 2), (2, 7)]
    assert rounds(8, 9) == [(8, 2), (4, 4), (2, 9)]
    assert rounds(1, 3) == [(1, 3)]
    points = comparable(points_of([trial(i, i, float(i)) for i in range(5)], "bound"))
    wanted, left = wanted_repeats(points, 4, 6, lambda of, repeat: False)
    assert wanted == [(of, repeat) for of in range(4) for repeat in (1, 2)]
    assert [point.number for point in left] == [0, 1, 2, 3]


def test_a_later_seed_does_not_change_who_is_in_a_round():
    rows = [trial(i, i, float(i)) for i in range(3)]
    first = {0: [0.0, 0.0], 1: [1.0, 1.0], 2: [2.0, 2.0]}
    for of, those in first.items():
        rows += [trial(-1, None, y, role="repeat", of=of, repeat=r) for r, y in enumerate(those, 1)]
    rows.append(trial(-1, None, 99.0, role="repeat", of=0, repeat=3))
    done = {(of, r) for of in range(3) for r in (1, 2)} | {(0, 3)}
    wanted, left = wanted_repeats(comparable(points_of(rows, "bound")), 4, 6, lambda *pair: pair in done)
    assert [point.number for point in left] == [0, 1]
    assert {of for of, repeat in wanted if repeat > 2} == {0, 1}


def test_a_setting_above_a_limit_is_no_point():
    rows = [trial(0, "A", 1.0, within_limits=False), trial(1, "B", 2.0)]
    assert [point.number for point in points_of(rows, "bound")] == [1]
