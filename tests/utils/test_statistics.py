"""Standard errors against closed forms, and against the spread of many repetitions."""

import math

import numpy as np
import pytest
import torch

from ltm_pyro.utils.statistics import ratio_standard_error, standard_error

KINDS = pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])


@KINDS
def test_the_standard_error_of_a_mean_in_closed_form(make):
    values = make([float(n) for n in range(1, 8)])  # 1 … N has the variance N (N + 1) / 12
    assert float(standard_error(values)) == pytest.approx(math.sqrt(8 / 12), rel=1e-14)
    assert float(standard_error(3 * values - 5)) == pytest.approx(3 * math.sqrt(8 / 12), rel=1e-14)
    assert float(standard_error(make([2.0, 6.0]))) == pytest.approx(2.0, rel=1e-14)  # half the distance of two
    assert float(standard_error(make([4.0] * 9))) == 0.0


def test_a_share_has_the_standard_error_of_its_truth_values():
    right = np.array([True] * 30 + [False] * 20)
    assert standard_error(right) == pytest.approx(math.sqrt(0.6 * 0.4 / 49), rel=1e-14)


@KINDS
def test_series_side_by_side_have_the_figures_that_they_have_alone(make):
    values = make(np.random.default_rng(0).normal(size=(5, 3)).tolist())
    for axis in (0, 1, -1):
        alone = [float(standard_error(x)) for x in (values.T if axis == 0 else values)]
        assert standard_error(values, axis).tolist() == pytest.approx(alone, rel=1e-14)
    sizes = make([4.0, 1.0, 2.0, 2.0, 3.0])
    alone = [float(ratio_standard_error(values[:, n], sizes)) for n in range(3)]
    assert ratio_standard_error(values, sizes).tolist() == pytest.approx(alone, rel=1e-14)


@KINDS
def test_one_value_has_no_standard_error(make):
    assert math.isnan(standard_error(make([1.0])))
    assert math.isnan(ratio_standard_error(make([1.0]), make([2.0])))
    assert np.isnan(np.asarray(standard_error(make([[1.0, 2.0]])))).tolist() == [True, True]
    assert np.isnan(np.asarray(ratio_standard_error(make([[1.0, 2.0]]), make([2.0])))).tolist() == [True, True]


@KINDS
def test_the_standard_error_of_a_ratio_in_closed_form(make):
    a, b = make([1.0, 4.0, 5.0]), make([2.0, 3.0, 5.0])  # R = 1, residuals −1, 1, 0
    assert float(ratio_standard_error(a, b)) == pytest.approx(math.sqrt(3) / 10, rel=1e-14)
    assert float(ratio_standard_error(7 * b, b)) == pytest.approx(0.0, abs=1e-14)  # one ratio everywhere


@KINDS
def test_a_ratio_of_equal_denominators_is_a_mean(make):
    a = make([0.3, 1.7, -2.0, 0.9])
    expected = float(standard_error(a)) / 5
    assert float(ratio_standard_error(a, make([5.0] * 4))) == pytest.approx(expected, rel=1e-13)


def test_both_match_the_spread_of_many_repetitions():
    draws = np.random.default_rng(0)
    sizes = draws.integers(5, 50, size=(2000, 100)).astype(float)
    totals = 2 * sizes + np.sqrt(sizes) * draws.normal(size=sizes.shape)
    spread = (totals.sum(1) / sizes.sum(1)).std()
    errors = [ratio_standard_error(*pair) for pair in zip(totals, sizes, strict=True)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    assert standard_error(totals, axis=1).mean() == pytest.approx(totals.mean(1).std(), rel=0.05)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_examples_of_one_cluster_count_as_one(make):
    """Pieces of one document: their sums are the independent examples, and one document alone has no error."""
    draw = np.random.default_rng(0)
    clusters, sizes = draw.integers(0, 7, 40), draw.integers(1, 9, 40).astype(float)
    values = draw.normal(size=(40, 2))
    sums = [np.array([x[clusters == n].sum(0) for n in range(7)]) for x in (values, sizes)]
    found = ratio_standard_error(make(values), make(sizes), make(clusters))
    assert found.tolist() == pytest.approx(ratio_standard_error(*sums).tolist(), rel=1e-12)
    assert math.isnan(ratio_standard_error(make(values[:, 0]), make(sizes), make([3] * 40)))


def test_copies_of_a_document_do_not_shrink_its_error():
    draw = np.random.default_rng(1)
    values, sizes = draw.normal(size=30), np.ones(30)
    once = ratio_standard_error(values, sizes)
    copies = [np.repeat(x, 4) for x in (values, sizes, np.arange(30))]
    assert ratio_standard_error(*copies) == pytest.approx(once)
    assert ratio_standard_error(*copies[:2]) == pytest.approx(once / 2, rel=0.03)
