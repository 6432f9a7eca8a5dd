"""`check_inference` meets the limits it is there to show."""

import pytest

from ltm_pyro.studies.check_inference import check_inference

LIMITS = {"MeanField": (1e-3, 0.01), "FullCovariance": (1e-3, 0.01)}  # mean error, relative variance error


@pytest.fixture(scope="module")
def report():
    return check_inference()


@pytest.mark.parametrize("guide", LIMITS)
def test_the_known_posterior_is_found(report, guide):
    figures, (mean, variance) = report["linear_gaussian"][guide], LIMITS[guide]
    assert figures["mean_error"] < mean
    assert figures["variance_relative_error"] < variance
    assert figures["covariance_relative_error"] < variance


@pytest.mark.parametrize("model", ["linear_gaussian", "two_modes"])
@pytest.mark.parametrize("guide", LIMITS)
def test_bounds_are_bounds_and_the_other_is_not(report, model, guide):
    figures = report[model][guide]
    bounds = figures["bounds"]
    for bound in bounds.values():
        assert bound["is_bound"]
        assert bound["above_evidence"] <= 3 * bound["stderr"] + 1e-9
    slack = 3 * (bounds["bound"]["stderr"] + bounds["iwae"]["stderr"]) + 1e-9
    assert bounds["bound"]["estimate"] <= bounds["iwae"]["estimate"] + slack
    assert figures["reused_noise"]["above_evidence"] > 0
    assert not figures["reused_noise"]["is_bound"]


def test_the_exact_family_reaches_the_evidence_and_one_mode_does_not(report):
    exact = report["linear_gaussian"]["FullCovariance"]
    assert abs(exact["bounds"]["iwae"]["above_evidence"]) < 0.02
    assert exact["trusted_sequences"] == len(exact["pareto_k"])
    assert report["two_modes"]["FullCovariance"]["bounds"]["bound"]["above_evidence"] < -0.6  # about log 2
