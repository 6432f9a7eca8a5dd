"""`ltm baselines`: everything is trained once, goes on where it was interrupted, and is on one page."""

import json

import pytest

from ltm_pyro.studies import baselines
from ltm_pyro.studies.baselines import MODELS


@pytest.mark.slow
def test_everything_is_trained_once_and_goes_on_where_it_was_interrupted(recipe, tmp_path, ltm, monkeypatch):
    command = ("baselines", "--config", recipe, "--budget", "2560tokens", "--match", "tokens", "--rates", "1,2")
    command = (
        *command,
        "--search-share",
        0.3,
        "--seeds",
        "0",
        "--samples",
        8,
        "--texts",
        12,
        "--out",
        tmp_path / "out",
    )
    trained, train = [], baselines.train

    def stops(config, *rest):
        if len(trained) == 9:
            raise KeyboardInterrupt
        trained.append(config.run)
        return train(config, *rest)

    monkeypatch.setattr(baselines, "train", stops)
    assert ltm(*command)[0] == 130
    monkeypatch.setattr(baselines, "train", lambda config, *rest: (trained.append(config.run), train(config, *rest))[1])
    code, out, err = ltm(*command, "--json")
    assert code == 0, err
    assert "minutes of training, scoring apart: 4 models, for each 2 rates at 0.3 of the budget" in err
    assert len(trained) == len(set(trained)) == len(MODELS) * (1 + 2 + 1)
    found = json.loads(out)
    assert [row["model"] for row in found["rows"]] == [*MODELS]
    assert [row["exact"] for row in found["rows"]] == [False, True, True, False]
    assert len(found["verdicts"]) == len(MODELS) - 1
    assert {*found["texts"]} == {*MODELS, "held-out text"}
    assert all(each["figures"]["entropy"] > 0 for each in found["texts"].values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(model in page for model in MODELS)
    assert "http:" not in page
    assert "https:" not in page
    assert ltm(*command, "--json")[1] == out
    assert len(trained) == len(MODELS) * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "5"), "The budget '5' is no amount: give 2e12flops or 4e6tokens."),
        (("--budget", "1e6tokens"), "--match flops needs a budget in flops, got 1e6tokens."),
        (("--budget", "1e3flops"), "0.2 of the budget 1e3flops is less than one step of latent-thought"),
        (("--budget", "1e9flops", "--rates", "0"), "'0' is not a number above 0"),
        (("--budget", "1e9flops", "--search-share", "2"), "'2' is more than all of the budget"),
        (("--budget", "1e9flops", "--seeds", "-1"), "'-1' is not a whole number of at least 0"),
        (("--budget", "1e9flops", "--data", "nowhere"), "nowhere is not a packed corpus"),
        (("--budget", "1e9flops", "--suite-dir", "nowhere"), "The suite directory nowhere does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(refused, recipe, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("baselines", "--config", recipe, *arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())
