"""Simulation-based calibration accepts the exact posterior as often as it should, and rejects a narrow one."""

import numpy as np
import pytest

from ltm_pyro.analysis.calibration import LOG_LIKELIHOOD, Calibration, calibrate, envelope
from ltm_pyro.analysis.pictures.calibration import plot_calibration, plot_ecdf
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference

STILL = LocalInference(steps=0)


def p_value(model, guide, simulate, seed, simulations=100, permutations=199):
    found = calibrate(model, guide, STILL, simulate(model), simulations, samples=99, seed=seed)
    return found.p_value(permutations)


def test_the_exact_posterior_passes_and_narrow_wide_or_uncorrelated_ones_do_not(known, exact, simulate):
    assert p_value(known, exact(known), simulate, 0) > 0.05
    assert p_value(known, exact(known, scale=0.8), simulate, 0) < 0.01
    assert p_value(known, exact(known, scale=1.25), simulate, 0, simulations=200) < 0.01
    assert p_value(known, exact(known, diagonal=True), simulate, 0) < 0.01


@pytest.mark.slow
def test_size_and_power(known, exact, simulate):
    """100 repeats: it rejects the exact posterior in 5 % of them, and one narrower by a fifth nearly always."""
    exact_p = np.array([p_value(known, exact(known), simulate, seed) for seed in range(100)])
    narrow_p = np.array([p_value(known, exact(known, scale=0.8), simulate, seed) for seed in range(100)])
    assert (exact_p > 0.01).sum() >= 95
    assert (exact_p <= 0.05).sum() <= 11  # 5 % ± 2.7 binomial standard errors
    assert (narrow_p <= 0.05).mean() >= 0.9


def test_p_values_are_uniform_for_exchangeable_values_however_they_depend():
    random = np.random.default_rng(1)
    common = random.normal(size=(200, 40, 20, 1)) + 0.1 * random.normal(size=(200, 40, 20, 5))
    values = [Calibration(x, tuple("abcde")).p_value(99) for x in common]
    assert abs(np.mean(values) - 0.5) < 3 * 0.29 / 200**0.5
    assert np.mean(np.array(values) <= 0.05) < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_many_coordinates_do_not_drown_the_log_likelihood():
    random = np.random.default_rng(0)
    values = random.normal(size=(40, 20, 129))
    values[:, 0, -1] += 1.5
    assert Calibration(values, tuple(map(str, range(129)))).p_value(199) < 0.02


@pytest.mark.parametrize("samples", [9, 19, 29, 99])
def test_coverage_is_judged_by_what_ranks_can_attain(samples):
    """Every rank occurs once, as expected of an exact posterior."""
    values = np.arange(samples + 1.0)
    rows = np.stack([np.roll(values, shift) for shift in range(samples + 1)])[..., None].repeat(2, -1)
    found, levels = Calibration(rows, ("a", LOG_LIKELIHOOD)), np.array([0.5, 0.8, 0.95])
    np.testing.assert_allclose(found.coverage(levels), found.attainable(levels))


def test_coverage_of_known_scales():
    """If truths are twice as wide as the draws, the 90 % interval contains 59 % of them."""
    random = np.random.default_rng(0)
    values = random.normal(size=(4000, 100, 2))
    values[:, 0] *= 2
    levels = np.array([0.68, 0.9])
    np.testing.assert_allclose(Calibration(values, ("a", "b")).coverage(levels), [0.381, 0.589], atol=0.025)


def test_ranks_count_the_draws_below_the_truth():
    values = np.array([[[2.0], [1.0], [3.0], [0.0]]])
    assert Calibration(values, ("a",)).ranks.tolist() == [[2]]


def test_the_envelope_holds_uniform_ranks_as_often_as_it_says():
    points = np.linspace(0, 1, 21)[1:-1]
    low, high = envelope(50, points)
    ecdf = (np.random.default_rng(3).random((2000, 50, 1)) <= points).mean(1)
    assert ((ecdf >= low) & (ecdf <= high)).all(1).mean() == pytest.approx(0.95, abs=0.02)


def test_it_comes_back_from_disk(known, exact, simulate, tmp_path):
    found = calibrate(known, exact(known), STILL, simulate(known), 20, 19)
    found.save(tmp_path / "ranks.nc")
    again = Calibration.load(tmp_path / "ranks.nc")
    assert again.names == found.names == (*(f"z[{i}, 1, {j}]" for i in (1, 2) for j in range(3)), "log p(x | z)")
    assert again.p_value(99) == found.p_value(99)
    assert (again.ranks == found.ranks).all()


@pytest.mark.parametrize(("options", "words"), [((10, 99), "20 simulations, got 10"), ((40, 50), "multiple of 10")])
def test_too_few_simulations_or_odd_draws(known, exact, simulate, options, words):
    with pytest.raises(UsageError, match=words):
        calibrate(known, exact(known), STILL, simulate(known), *options)


def test_the_picture_judges_an_exact_posterior_as_often_as_it_says():
    """The ECDF of ranks from 0 to 19 has other steps than that of ranks from 0 to 99."""
    random, left = np.random.default_rng(0), 0
    for _ in range(40):
        line = plot_ecdf(Calibration(random.normal(size=(400, 20, 2)), ("a", LOG_LIKELIHOOD))).lines[0]
        points, ecdf = line.get_xdata(), line.get_xdata() + line.get_ydata()
        low, high = envelope(400, points)
        left += ((ecdf < low - 1e-9) | (ecdf > high + 1e-9)).any()
    assert left <= 6  # 5 % and three standard errors


def inside(shares_N, candidates):
    """Whether the ECDF of uniform shares stays within its envelope."""
    points = np.arange(1, candidates) / candidates
    low, high = envelope(len(shares_N), points)
    ecdf = (shares_N[:, None] <= points).mean(0)
    return bool(((low <= ecdf) & (ecdf <= high)).all())


def test_tarp_sees_a_narrow_q_and_lost_correlations(known, exact, simulate):
    def tarp(guide):
        return calibrate(known, guide, STILL, simulate(known), 300, samples=49).tarp()

    assert inside(tarp(exact(known)), 50)
    assert not inside(tarp(exact(known, scale=0.6)), 50)
    assert not inside(tarp(exact(known, scale=1.7)), 50)


def test_coverage_by_coordinate_averages_to_the_coverage(known, exact, simulate):
    found, levels = calibrate(known, exact(known), STILL, simulate(known), 200, samples=49), np.array([0.5, 0.9])
    by_coordinate = found.coverage_by_coordinate(levels)
    np.testing.assert_allclose(by_coordinate[:, :-1].mean(1), found.coverage(levels))
    low, high = envelope(200, found.attainable(levels))
    assert ((by_coordinate >= low[:, None]) & (by_coordinate <= high[:, None])).mean() > 0.9


def test_contraction_and_z_scores_are_the_closed_forms(known, exact, simulate):
    found = calibrate(known, exact(known), STILL, simulate(known), 400, samples=199)
    contraction, z = found.contraction()
    truth = 1 - known.posterior(known.sample_batch(1)).covariance_BNN[0].diagonal().numpy()
    np.testing.assert_allclose(contraction.mean(0), truth, atol=0.08)
    np.testing.assert_allclose(z.std(0), 1, atol=0.15)
    off = calibrate(known, exact(known, shift=2.0), STILL, simulate(known), 100, samples=199).contraction()[1]
    np.testing.assert_allclose(off.mean(0), 2, atol=0.4)


def test_the_picture_has_all_five_plots(known, exact, simulate):
    found = calibrate(known, exact(known), STILL, simulate(known), 40, samples=19)
    titles = [ax.get_title() for ax in plot_calibration(found).axes]
    assert titles[2:] == ["Coverage", "TARP", "z-score and contraction"]
