"""Standard errors against closed forms, and against the spread of many repetitions."""

import math

import numpy as np
import pytest
import torch

from ltm_pyro.utils.statistics import clustered_mean, clustered_ratio, standard_error

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
    alone = [clustered_ratio(values[:, n], sizes).stderr for n in range(3)]
    assert clustered_ratio(values, sizes).stderr.tolist() == pytest.approx(alone, rel=1e-14)


@KINDS
def test_one_value_has_no_standard_error(make):
    assert math.isnan(standard_error(make([1.0])))
    found = clustered_ratio(make([1.0]), make([2.0]))
    assert found.value == 0.5
    assert math.isnan(found.stderr)
    assert all(math.isnan(x) for x in found.interval)
    assert np.isnan(np.asarray(standard_error(make([[1.0, 2.0]])))).tolist() == [True, True]
    assert np.isnan(clustered_ratio(make([[1.0, 2.0]]), make([2.0])).stderr).tolist() == [True, True]


@KINDS
def test_the_error_of_a_ratio_in_closed_form(make):
    a, b = make([1.0, 4.0, 5.0]), make([2.0, 3.0, 5.0])  # without one: 9/8, 6/7, 1
    found = clustered_ratio(a, b)
    assert found.value == 1
    assert found.stderr == pytest.approx(math.sqrt(2 / 3 * (1 / 64 + 1 / 49)), rel=1e-13)
    assert clustered_ratio(7 * b, b).stderr == pytest.approx(0.0, abs=1e-14)  # one ratio everywhere


@KINDS
def test_a_ratio_of_equal_denominators_is_a_mean(make):
    a = make([0.3, 1.7, -2.0, 0.9])
    found, mean = clustered_ratio(a, make([5.0] * 4)), clustered_mean(a)
    assert mean.stderr == pytest.approx(float(standard_error(a)), rel=1e-13)
    assert found.stderr == pytest.approx(mean.stderr / 5, rel=1e-13)
    half = 3.182446305284263 * mean.stderr  # t with 3 degrees of freedom
    assert mean.interval == pytest.approx((mean.value - half, mean.value + half), rel=1e-9)


def test_both_match_the_spread_of_many_repetitions():
    draws = np.random.default_rng(0)
    sizes = draws.integers(5, 50, size=(2000, 100)).astype(float)
    totals = 2 * sizes + np.sqrt(sizes) * draws.normal(size=sizes.shape)
    spread = (totals.sum(1) / sizes.sum(1)).std()
    errors = [clustered_ratio(*pair).stderr for pair in zip(totals, sizes, strict=True)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    assert standard_error(totals, axis=1).mean() == pytest.approx(totals.mean(1).std(), rel=0.05)


@KINDS
def test_examples_of_one_cluster_count_as_one(make):
    """Pieces of one document: their sums are the independent examples, and one document alone has no error."""
    draw = np.random.default_rng(0)
    clusters, sizes = draw.integers(0, 7, 40), draw.integers(1, 9, 40).astype(float)
    values = draw.normal(size=(40, 2))
    sums = [np.array([x[clusters == n].sum(0) for n in range(7)]) for x in (values, sizes)]
    found = clustered_ratio(make(values.tolist()), make(sizes.tolist()), make(clusters.tolist()))
    assert found.stderr.tolist() == pytest.approx(clustered_ratio(*sums).stderr.tolist(), rel=1e-12)
    assert math.isnan(clustered_mean(make(values[:, 0].tolist()), make([3] * 40)).stderr)


def test_copies_of_a_document_do_not_shrink_its_error():
    draw = np.random.default_rng(1)
    values, sizes = draw.normal(size=30), np.ones(30)
    once = clustered_ratio(values, sizes)
    copies = [np.repeat(x, 4) for x in (values, sizes, np.arange(30))]
    assert clustered_ratio(*copies).stderr == pytest.approx(once.stderr)
    assert clustered_ratio(*copies[:2]).stderr == pytest.approx(once.stderr / 2, rel=0.03)


@pytest.mark.parametrize("most", [1, 4], ids=["equal documents", "documents of 1 to 4 pieces"])
@pytest.mark.parametrize("documents", [5, 8, 20, 60])
def test_an_interval_covers_as_often_as_it_says(documents, most):
    """A latent is shared within a document, two models are compared on the same pieces, and the truth is 0."""
    draw, covered, repeats = np.random.default_rng(0), 0, 2000
    for _ in range(repeats):
        index = np.repeat(np.arange(documents), draw.integers(1, most + 1, documents))
        first, second = (draw.normal(size=documents)[index] + 0.3 * draw.normal(size=len(index)) for _ in range(2))
        low, high = clustered_mean(first - second, index).interval
        covered += low <= 0 <= high
    assert 0.935 <= covered / repeats <= 0.965


def test_clusters_with_nothing_in_them_do_not_count():
    """Such as documents whose completion is empty: a ratio of one cluster has no error, and no division by 0."""
    a, b = np.array([3.0, 4.0, 0.0]), np.array([2.0, 3.0, 0.0])
    assert clustered_ratio(a, b) == clustered_ratio(a[:2], b[:2])
    assert math.isnan(clustered_ratio(a[[0, 2]], b[[0, 2]]).stderr)
    assert clustered_ratio(a[[0, 2]], b[[0, 2]]).value == 1.5
    assert math.isnan(clustered_ratio(0 * a, 0 * b).value)
    infinite = clustered_ratio(np.array([3.0, np.inf]), np.ones(2))
    assert infinite.value == math.inf
    assert math.isnan(infinite.stderr)


def test_of_no_example_there_is_no_ratio():
    for clusters in (None, np.array([])):
        found = clustered_ratio(np.array([]), np.array([]), clusters)
        assert np.isnan([found.value, found.stderr, *found.interval, found.p_value]).all()
