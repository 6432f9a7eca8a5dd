"""The report: a page that needs nothing else, with pictures, reasons and figures that can be counted again."""

import csv
import re

import numpy as np
import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.studies import inference_steps, scaling
from ltm_pyro.studies.search.fits import power_law
from ltm_pyro.studies.search.report import write_report

MIXED = """
'''Which of both?'''
from optuna.distributions import FloatDistribution, IntDistribution
space = {"model.inference.rate": FloatDistribution(0.1, 1.0), "model.inference.steps": IntDistribution(1, 8)}
figures = ["cost"]
def objective(setting):
    rate, steps = setting.parameters.get("model.inference.rate", .3), setting.parameters.get("model.inference.steps", 3)
    if rate > 0.9 and setting.run.name < "trial-0008":  # later ones complete, whatever the sampler looks for
        raise RuntimeError("too <fast>")
    return {"bound": (rate - 0.3) ** 2 + 0.01 * steps, "cost": steps / 8}
"""


@pytest.mark.parametrize("minimise", [("bound",), ("bound", "cost")])
def test_a_report_is_complete_and_self_contained(run, study_file, tmp_path, minimise):
    found = run(18, study_file(MIXED), minimise=minimise, repeats=2, finalists=2, name="mine", workers=2)
    url, out = f"sqlite:///{tmp_path / 'studies.db'}", tmp_path / "report"
    files = write_report(url, None, out, force=False)["files"]
    assert {"report.html", "trials.csv", "history-of-bound.png", "importance-for-bound.png"} <= set(files)
    assert ("pareto-front.png" in files) == (len(minimise) == 2)
    page = (out / "report.html").read_text("utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") + page.count("<svg") == len(files) - 2
    best = next(row for row in found["trials"] if row["number"] == found["best"])
    assert f"trial {found['best']}, seed {best['seed']}: bound " in page  # under the pointer
    assert "seeds-of-bound.png" in files
    assert "<h1>Study mine</h1>" in page
    assert "too &lt;fast&gt;" in page
    assert found["recommendation"].split(":")[0] in page
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [row["state"] for row in found["trials"]]
    assert float(rows[0]["params_model.inference.rate"]) == found["trials"][0]["parameters"]["model.inference.rate"]
    assert float(rows[found["best"]]["bound"]) == found["trials"][found["best"]]["figures"]["bound"]
    with pytest.raises(UsageError, match="is there and not empty"):
        write_report(url, None, out, force=False)
    write_report(url, None, out, force=True)


SHADOWS = """
from optuna.distributions import CategoricalDistribution
space = {"prior": CategoricalDistribution(["ltm_pyro.models.GaussianPrior", "ltm_pyro.models.MixturePrior"])}
points = [{"prior": prior} for prior in space["prior"].choices]
checks = False
def settings(parameters):
    return {"model.prior": parameters["prior"]}
def objective(setting):
    return {"bound": 1.0 + 0.5 * ("Mixture" in setting.parameters["prior"]), "prior": 77.25}
"""


def test_a_parameter_hides_no_figure_and_classes_have_short_names(run, study_file, tmp_path):
    found = run(2, study_file(SHADOWS))
    assert "compare priors by evidence" in found["recommendation"]
    write_report(f"sqlite:///{tmp_path / 'studies.db'}", None, tmp_path / "report", force=False)
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert page.count("<td>77.25</td>") == 2
    assert page.count("<td>ltm_pyro.models.GaussianPrior</td>") == 1
    assert ">GaussianPrior</text>" in page  # on the axis


def test_a_power_law_is_found_with_an_honest_interval():
    x = np.array([1e10, 3e10, 1e11, 3e11, 1e12, 3e12])
    exact = power_law(x.tolist(), (5 * x**-0.07).tolist())
    assert (exact.scale, exact.exponent) == pytest.approx((5, 0.07))
    assert exact.low == pytest.approx(0.07)
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        law = power_law(x.tolist(), (5 * x**-0.07 * np.exp(draw.normal(0, 0.02, len(x)))).tolist(), draws=200)
        hits += law.low <= 0.07 <= law.high
    assert 0.7 < hits / 60 <= 1  # 0.9, less what a percentile interval of six points loses


def test_scaling_says_what_its_points_say():
    def bound(p):
        best = scaling.WIDTHS[p["flops"]][1]
        return 40 * p["flops"] ** -0.09 + abs(p["width"] - best) / 100 + 0.02 * p["steps"]

    rows = [
        {"state": "complete", "parameters": p, "figures": {"bound": bound(p), "parameters": 1000 * p["width"]}}
        for p in scaling.points
    ]
    pictures, said = scaling.analyse([*rows, {"state": "fail", "parameters": {}, "figures": {}}])
    assert all(image.startswith(b"\x89PNG") for image in pictures.values())
    assert len(said) == len(scaling.WAYS) + len(scaling.WIDTHS)
    assert said[0].startswith("autoregressive: bound of the best size = 40 · C^-0.0900")
    assert all("More parameters won" in sentence for sentence in said[len(scaling.WAYS) :])
    assert scaling.analyse(rows[:5])[1] == []


def test_scaling_comes_to_complete_curves_soon():
    flops = [p["flops"] for p in scaling.points]
    assert flops == sorted(flops)
    for budget in scaling.WIDTHS:
        points = [tuple(p.values()) for p in scaling.points if p["flops"] == budget]
        one, other = points[: len(points) // 2], points[len(points) // 2 :]
        assert one == other, "a seed after the other"
        assert len({*one}) == len(one)


def test_inference_steps_says_what_its_points_say():
    rows = [
        {
            "state": "complete",
            "parameters": p,
            "figures": {"bound": 4 + 0.01 * p["steps"], "prior": 5.0}
            | {f"bound_at_{t}": 5 - 0.01 * t for t in inference_steps.TESTED}
            | {f"gain_at_{t}": 0.01 * t for t in inference_steps.TESTED},
        }
        for p in inference_steps.points
    ]
    pictures, said = inference_steps.analyse(rows)
    assert all(image.startswith(b"\x89PNG") for image in pictures.values())
    assert all("T_fast 1" in sentence and "autoregressive 4.000" in sentence for sentence in said)
