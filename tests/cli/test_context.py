"""`ltm evaluate RUN --floor … --ceiling …`: the context recovered."""

import json

import pytest
import yaml

from ltm_pyro.studies.configure import as_options
from ltm_pyro.studies.context import ceiling, floor


def test_evaluate_prints_it_between_a_floor_and_a_ceiling(recipe, run, ltm, refused, tmp_path):
    decoder = yaml.safe_load(recipe.read_text())["model"]["decoder"]["init_args"]
    for name, settings in (("floor", floor(decoder)), ("ceiling", ceiling(decoder))):
        code, _, err = ltm("fit", "--config", recipe, "--run", tmp_path / name, *as_options(settings))
        assert code == 0, err
    words = ("evaluate", run, "--limit", 40, "--samples", 4, "--estimators", "bound,iwae")
    references = ("--floor", tmp_path / "floor", "--ceiling", tmp_path / "ceiling")
    found = json.loads(ltm(*words, *references, "--json")[1])
    assert set(found["estimates"]) == {"bound", "iwae", "shuffled", "prior"}
    context = found["context"]
    assert context["floor"]["nats_per_token"] - context["ceiling"]["nats_per_token"] == pytest.approx(
        context["difference"]["nats_per_token"]
    )
    text = ltm(*words, *references)[1]
    assert "floor - ceiling" in text
    assert "A prediction sees 7 tokens" in text
    assert bool(context["recovered"]) != ("No R" in text)
    assert "give both" in refused(*words, *references[:2])
    assert "has thoughts" in refused(*words, "--floor", run, "--ceiling", tmp_path / "ceiling")


def test_compare_trains_its_references_at_a_budget_of_flops(recipe, ltm, refused, tmp_path):
    words = ("compare", "--config", recipe, "--context", "--samples", 2, "--limit", 8, "--out", tmp_path / "out")
    code, out, err = ltm(*words, "--budget", "1e9flops", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = found["rows"]
    assert [row["name"] for row in rows] == ["autoregressive", "floor", "ceiling", "GaussianPrior-MeanField"]
    assert all(0.98e9 < row["flops"] < 1.02e9 for row in rows)
    assert (found["budget"], "minutes" in found) == ("1e9flops", False)
    assert all(row["context_recovered"] is None for row in rows[:3])
    text = " ".join(ltm(*words, "--budget", "1e9flops")[1].split())
    assert "after 1e9flops each" in text
    assert "FLOPs each" in text
    assert "choose another --out" in refused(*words, "--budget", "2e9flops")
    assert "give one" in refused(*words, "--budget", "1e9flops", "--minutes", 1)
    assert "less than 50 of the dearest steps" in refused(*words[:-1], tmp_path / "other", "--budget", "1e7flops")
