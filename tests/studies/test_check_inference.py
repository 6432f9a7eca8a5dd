"""`check_inference` meets the limits it is there to show."""

import sys

import pytest

from ltm_pyro import guides as shipped
from ltm_pyro.guides import FlowGuide
from ltm_pyro.studies import check_inference as study

LIMITS = {  # mean error, relative error of variances and covariances
    "MeanField": (1e-3, 0.01),
    "BlockCovariance": (1e-3, 0.01),
    "FullCovariance": (1e-3, 0.01),
    "JointCovariance": (1e-3, 0.01),  # of one site it is the same
    "Laplace": (1e-3, 0.01),
    "LowRank": (0.05, 0.05),  # some noise is left: a diagonal and four directions only just hold the posterior
}
CASES = {*study.CASES}  # all of them, before a test leaves some out
QUICK = ("FullCovariance",)


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def report(request):
    """The report on an exact guide, and, slowly, on all of them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "quick":
            patch.setattr(study, "CASES", {name: study.CASES[name] for name in QUICK})
        yield study.check_inference()


def test_every_guide_is_on_both_models(report):
    assert all(set(guides) == set(report["linear_gaussian"]) for guides in report.values())
    assert set(report["linear_gaussian"]) in (set(QUICK), {*LIMITS, "FlowGuide"})


def test_the_known_posterior_is_found(report):
    for name, figures in report["linear_gaussian"].items():
        mean, variance = LIMITS.get(name, (0.2, 1.0))  # FlowGuide's one reflection cannot hold every correlation
        best, posterior = figures["errors"]["best"], figures["errors"]["posterior"]
        assert best["mean"] < mean, name
        assert best["variance"] < variance, name
        assert best["covariance"] < variance, name
        if name in ("MeanField", "BlockCovariance"):
            assert posterior["variance"] > 0.2, "no factorised Gaussian has the posterior's variances"
            assert "which is not the posterior" in figures["verdict"]
        elif name in LIMITS:
            assert figures["verdict"] == "finds the posterior"


def test_no_shipped_guide_is_left_out_without_a_word():
    assert {*CASES, *study.LEFT_OUT} == {*shipped.__all__}


def test_bounds_are_bounds_and_the_other_is_not(report):
    for name, figures in (case for guides in report.values() for case in guides.items()):
        bounds = figures["bounds"]
        for bound in bounds.values():
            assert bound["is_bound"]
            assert bound["above_evidence"] <= 3 * bound["stderr"] + 1e-9, name
        slack = 3 * (bounds["bound"]["stderr"] + bounds["iwae"]["stderr"]) + 1e-9
        assert bounds["bound"]["estimate"] <= bounds["iwae"]["estimate"] + slack, name
        assert not figures["reused_noise"]["is_bound"]
        if name != "Laplace":  # whose fit takes no draws that could be used again
            assert figures["reused_noise"]["above_evidence"] > 0, name


def test_the_exact_family_reaches_the_evidence_and_one_mode_does_not(report):
    exact = report["linear_gaussian"]["FullCovariance"]
    assert abs(exact["bounds"]["iwae"]["above_evidence"]) < 0.02
    assert exact["trusted_sequences"] == len(exact["pareto_k"])
    assert report["two_modes"]["FullCovariance"]["bounds"]["bound"]["above_evidence"] < -0.6  # about log 2


def test_a_richer_family_comes_closer(report):
    bounds = {name: figures["bounds"]["bound"]["estimate"] for name, figures in report["linear_gaussian"].items()}
    if "MeanField" in bounds:
        assert bounds["MeanField"] < bounds["BlockCovariance"] < bounds["FullCovariance"]
        assert bounds["MeanField"] < min(bounds["FlowGuide"], bounds["LowRank"])


def test_a_guide_without_its_extra_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setattr(study, "CASES", {"FlowGuide": study.Case(guide=FlowGuide, inference=study.NOISY)})
    with pytest.warns(UserWarning, match="FlowGuide needs zuko.*It is left out"):
        assert not study._available()


def test_a_verdict_names_what_is_wrong():
    off = study._wrong({"mean": 3.0, "variance": 0.01, "covariance": 0.6})
    assert off == "means are off by up to 3.00 prior sd, covariances are wrong by up to 60% of the largest variance"
    assert "nan" in study._wrong({"mean": 0.0, "variance": float("nan"), "covariance": 0.0})
