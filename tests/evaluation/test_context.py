"""The context recovered: its value, its interval, its nulls, and where there is none."""

import numpy as np
import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.context import context_recovered
from ltm_pyro.evaluation.documents import compare


def records(nats_N, **others):
    """`DocumentScore.as_dict` of documents of 10 tokens."""
    columns = {"bound_nats": nats_N} | {f"{name}_nats": x for name, x in others.items()}
    return [
        {"id": n, "file": "", "tokens": 10, **{name: float(x[n]) for name, x in columns.items()}}
        for n in range(len(nats_N))
    ]


def trained(share, seed=0, documents=200):
    """Floor, model and ceiling of documents that differ much; the model recovers ``share`` of 5 nats on average."""
    random = np.random.default_rng(seed)
    document_N, noise_MN = random.normal(50, 10, documents), random.normal(0, 1, (3, documents))
    levels = (0.0, -5.0 * share, -5.0)
    return [records(document_N + level + noise_N) for level, noise_N in zip(levels, noise_MN, strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_interval_holds_the_share_that_was_recovered(share):
    found, inside = [], 0
    for seed in range(60):
        low, model, high = trained(share, seed)
        recovered = context_recovered([model], [low], [high], ["bound"]).recovered["bound"]
        found.append(recovered.share)
        inside += recovered.interval[0] < share < recovered.interval[1]
    assert np.mean(found) == pytest.approx(share, abs=0.02)
    assert inside >= 52  # of 60, with 95 % intervals: fewer in one of 500 repeats


def test_seeds_that_differ_widen_the_interval():
    low, model, high = trained(0.5)
    alike = context_recovered([model] * 3, [low] * 3, [high] * 3, ["bound"]).recovered["bound"]
    moved = [[{**x, "bound_nats": x["bound_nats"] + shift} for x in model] for shift in (-1.0, 0.0, 1.0)]
    apart = context_recovered(moved, [low] * 3, [high] * 3, ["bound"]).recovered["bound"]
    assert apart.share == pytest.approx(alike.share)
    assert np.ptp(apart.interval) > 1.5 * np.ptp(alike.interval)


def test_without_anything_beyond_the_window_there_is_no_share():
    low, model, _ = trained(0.5)
    context = context_recovered([model], [low], [trained(0.0, seed=1)[0]], ["bound"])
    assert not context.has_context
    assert context.recovered == {}


def test_below_the_floor_is_paired_by_document_and_needs_no_ceiling():
    low, model, _ = trained(0.5)
    found = context_recovered([model], [low], [low], ["bound"])
    assert not found.recovered
    expected = compare(low, model)
    ahead = found.ahead["bound"]
    assert (ahead.below_floor, ahead.stderr_below_floor) == pytest.approx((expected.value, expected.stderr))
    assert found.as_dict()["ahead"]["bound"] == ahead._asdict()


def test_other_documents_are_refused():
    low, model, high = trained(0.5)
    with pytest.raises(UsageError, match="same documents"):
        context_recovered([model[1:]], [low], [high], ["bound"])
