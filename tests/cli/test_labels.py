"""A prior that asks for labels: from the pack to training, scores, posteriors and generated text."""

import json
from pathlib import Path

import pytest

from ltm_pyro.analysis import Posterior
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.runs.load import load_run

WORDS = {"north": "cold snow white ice winter wind", "south": "warm sand gold sun summer sea"}
OWN = """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule


class BySource(PyroModule):
    levels = {"source": ["north", "south"]}

    def __init__(self, shape):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(3, *shape))
        self.slope = torch.nn.Parameter(torch.zeros(*shape))

    def forward(self, source, year):
        years_B111 = (year.nan_to_num(2000.0) - 2000)[..., None, None, None] / 10
        return pyro.sample("z", dist.Normal(self.mean[source] + years_B111 * self.slope, 1.0).to_event(3))
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Texts of two sources, some of them without a label; packed, with a recipe of three steps."""
    from tests.cli.conftest import RECIPE, call

    folder = tmp_path_factory.mktemp("labelled")
    lines = []
    for n in range(80):
        source = "north" if n % 2 else "south"
        words = WORDS[source].split()
        text = " ".join(words[(n * k) % 6] for k in range(1, 13)) + f" {n}"
        label = {} if n % 10 == 0 else {"source": source}
        lines.append(json.dumps({"text": text, "id": f"d{n}", "year": 1990 + n % 30} | label) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    options = ("--id", "id", "--label", "source,year", "--tokenizer", "bpe:280", "--seq-len", 16, "--val-fraction", 0.3)
    code, _, err = call("data", "pack", folder / "texts.jsonl", "--out", folder / "pack", *options)
    assert code == 0, err
    recipe = RECIPE | {"data": {"directory": str(folder / "pack"), "batch_size": 8}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "by_source.py").write_text(OWN)
    return folder


def parts(folder, kind):
    """The options of a prior that asks for the source."""
    if kind == "own":
        return ("--model.prior", f"{folder / 'by_source.py'}:BySource")
    levels = '["north", "south"]'
    return ("--model.prior", kind, "--model.prior.label", "source", "--model.prior.levels", levels)


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("GroupedPrior", "own")]


@pytest.mark.parametrize("kind", ["ConditionalPrior", *SLOW])
def test_labels_go_all_the_way(kind, labelled, ltm, refused, tmp_path):
    run = tmp_path / "run"
    code, _, err = ltm("fit", "--config", labelled / "recipe.yaml", "--run", run, *parts(labelled, kind))
    assert code == 0, err
    code, out, err = ltm("evaluate", run, "--samples", 2, "--by-document", tmp_path / "scores.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["estimates"]["bound"]["nats_per_token"] > 0

    trained = load_run(run)
    prior = trained.model.prior
    means = dict(prior.named_parameters())[{"GroupedPrior": "effect.loc", "own": "mean"}.get(kind, "mean_GLKD")]
    means.data += 5 * (-1) ** len(means) * (1 + 0 * means)
    means.data[-1] -= 10  # the last level is far from the others
    figure = evaluate_run(trained, estimators=["bound"], samples=2).estimates["bound"].nats_per_token
    means.data = means.data.flip(0)
    assert evaluate_run(trained, estimators=["bound"], samples=2).estimates["bound"].nats_per_token != figure

    written = {}
    for source in ("north", "south", "nowhere"):
        label = ("--label", f"source={source}", *(("--label", "year=2010") if kind == "own" else ()))
        code, out, err = ltm("generate", run, "--num-samples", 3, "--max-new-tokens", 4, "--json", *label)
        assert code == 0, err
        written[source] = json.loads(out)["samples"]
        assert len(written[source]) == 3
    assert "does not ask for the label 'author'" in refused("generate", run, "--label", "author=me")
    assert "is not NAME=VALUE" in refused("generate", run, "--label", "source")

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": WORDS[x], "source": x}) + "\n" for x in WORDS))
    code, _, err = ltm(
        "posterior", run, "--input", texts, "--longer", "cut", "--samples", 25, "--out", tmp_path / "q.nc"
    )
    assert code == 0, err
    assert Posterior.load(tmp_path / "q.nc").z.shape[2] == 2
    code, _, err = ltm("report", tmp_path / "q.nc", "--run", run, "--out", tmp_path / "report.html")
    assert code == 0, err
    assert ltm("show", run, "--svg", tmp_path / "plates.svg")[0] == 0


def test_data_without_the_label_are_refused(recipe, refused, labelled, tmp_path):
    fit = ("fit", "--run", tmp_path / "run", "--config")
    message = refused(*fit, recipe, *parts(labelled, "ConditionalPrior"))
    assert "ConditionalPrior asks for the label 'source'" in message
    assert "--label source" in message
    options = ("--model.prior", "GroupedPrior", "--model.prior.label", "source", "--model.prior.levels", '["east"]')
    message = refused(*fit, labelled / "recipe.yaml", *options)
    assert "knows the values east of the label 'source', of which" in message
    assert "north, south" in message
    assert not Path(tmp_path / "run").exists()
