"""What a study recommends, in words: the mean over seeds, its lead, the edge of the space, unequal spends."""

import json

import pytest
from optuna.distributions import FloatDistribution, distribution_to_json

from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.recommend import decide, points_of
from ltm_pyro.studies.search.wording import as_dict, in_words
from tests.studies.search.conftest import trial

SPACE = {"x": json.loads(distribution_to_json(FloatDistribution(1.0, 100.0, log=True)))}


def plan(**changes):
    return Plan(
        **{"study": "s", "question": "?", "space": SPACE, "recipe": "", "budget": "1e9flops", "at_most": {}} | changes
    )


def said(rows, finalists=2, repeats=3, of=None, is_done=True):
    of = of or plan()
    verdict = decide(points_of(rows, *of.objectives[0]), finalists, repeats, lambda number, repeat: is_done)
    return in_words(rows, verdict, of), verdict and as_dict(verdict, of.objectives[0][1])


def repeated(values):
    """Two settings, searched once and repeated with these figures."""
    rows = [trial(number, x, 0.5) for number, x in enumerate((10.0, 20.0))]
    for of, those in enumerate(values):
        rows += [trial(9, None, y, 9, role="repeat", of=of, repeat=r) for r, y in enumerate(those, 1)]
    return rows


def test_a_lead_is_told_with_its_interval():
    text, found = said(repeated([(1.0, 1.2, 1.1), (2.0, 2.21, 2.1)]))
    assert text.startswith(
        "Recommended: trial 0, bound 1.1000 ± 0.0577 (the mean over 3 fresh seeds; 0.5000 in the search"
    )
    assert "x = 10. It is ahead of trial 1 by 1.0033 (95 % interval +0.98" in text
    assert "3 seeds, paired): established." in text
    assert (found["is_established"], found["equal"], found["leads"][0]["p"] < 0.03) == (True, [0], True)


def test_what_is_not_established_is_told():
    text, found = said(repeated([(1.0, 1.2, 1.1), (1.3, 1.0, 1.2)]))
    assert "It is not established that it is the best: ahead of trial 1 by 0.0667 (95 % interval -" in text
    assert "Equal: 0, 1." in text
    assert (found["is_established"], found["equal"]) == (False, [0, 1])
    text, _ = said(repeated([(1.0, 1.2), (2.0, 2.2)]), repeats=2)
    assert "an interval needs 3 seeds" in text
    text, found = said(repeated([(1.0, 1.2, 1.1), (2.0, 2.21, 2.1)]), is_done=False)
    assert "the repeats are not complete, and no winner is named" in text
    assert not found["is_established"]
    text, _ = said([trial(0, 10.0, 0.5)], repeats=0)
    assert "(one seed, by which it was chosen)" in text
    assert "that it is the best is not established" in text
    assert said([])[0].startswith("No trial is complete")


@pytest.mark.parametrize(("x", "where"), [(1.05, "lower"), (97.0, "upper"), (10.0, None)])
def test_the_edge_of_the_space_is_told(x, where):
    text, _ = said([trial(0, x, 0.5)], repeats=0)
    assert (f"x = {x:.4g} is at the {where} edge of 1 to 100: widen the space" in text) == bool(where)
    assert ("edge" in text) == bool(where)


def test_budgets_are_told_apart_and_spends_are_told():
    rows = [trial(n, 10 + n, 9.0 - n, max_flops=flops) for n, flops in enumerate((1e9, 1e9, 1e8))]
    text, found = said(rows, repeats=0)
    assert found["trial"] == 1
    assert text.startswith("Recommended at 1e+09 FLOPs: trial 1, bound 8.0000")
    assert "Best at the smaller budgets: 1e+08 FLOPs: trial 2, 7.0000 (one seed)." in text
    spent = [
        trial(n, 10 + n, 1.0, figures={"bound": 1.0, "flops": flops}) for n, flops in enumerate((1.005e9, 1.015e9))
    ]
    assert "Spent: 1.005e+09 to 1.015e+09 FLOPs each." in said(spent, repeats=0)[0]
    spent.append(trial(2, 12, 1.0, figures={"bound": 1.0, "flops": 3.5e9}))
    assert "differ by more than 2 %, and the comparison is not fair" in said(spent, repeats=0)[0]


def test_what_is_maximised_is_told_with_its_own_sign():
    of = plan(minimise=(), maximise=("gain",))
    rows = [trial(n, 10.0 + n, 0, figures={"gain": gain}) for n, gain in enumerate((0.25, 0.75))]
    text, found = said(rows, repeats=0, of=of)
    assert "trial 1, gain 0.7500" in text
    assert (found["trial"], found["mean"]) == (1, 0.75)
