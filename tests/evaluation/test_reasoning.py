"""The suite `reasoning`: what is counted as right, what is chosen where, and what each way costs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ltm_pyro.data.make import make_problems
from ltm_pyro.data.pack import pack as ltm_pack
from ltm_pyro.data.tasks import Arithmetic
from ltm_pyro.data.tokenizer import load_tokenizer, vocabulary_size
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites import reasoning
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Options
from ltm_pyro.evaluation.suites.table import SUITES, evaluate_suites, markdown, plot_reasoning
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.statistics import mcnemar


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    out = tmp_path_factory.mktemp("problems") / "pack"
    about = {"name": "arithmetic", "options": {}}
    make_problems(Arithmetic(1, 1, 2, largest=3), out, 200, about=about, val_fraction=0.2, test_fraction=0.2)
    return out


@pytest.fixture(scope="module")
def run(pack):
    tokenizer = load_tokenizer(pack / "tokenizer.json")
    torch.manual_seed(0)
    size = vocabulary_size(tokenizer)
    decoder = Decoder(vocabulary=size, layers=1, width=8, heads=1, window=8, length=24, thoughts=1, thought_width=2)
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    return Run(
        model=model.eval(),
        guide=MeanField(model),
        tokenizer=tokenizer,
        inference=LocalInference(steps=2),
        data=str(pack),
        length=24,
    )


def test_an_untrained_model_answers_nothing_and_every_way_has_its_cost(run, pack, tmp_path):
    options = Options(directory=pack.parent, limit=3, attempts=2)
    (part,) = reasoning.parts(options)
    assert part.name == "arithmetic"
    found = part.figures(run)
    ways = {"one draft", "greedy", "majority", "best of N", "rethinking", "rethinking greedily"}
    assert {*found["chosen"]} == ways | {"rethinking with votes"}
    assert found["one_draft"] == found["harder_majority"] == 0
    assert found["one_draft_high"] > 0.4  # of three questions
    assert found["rethinking_above_majority_p"] == 1
    test = found["curves"]["test"]
    assert test["majority"][0]["flops"] == test["one draft"][0]["flops"] < test["majority"][1]["flops"]
    one, two = (x["flops"] for x in test["rethinking"])
    assert two > one > test["majority"][1]["flops"]
    assert {x["split"] for x in found[BY_DOCUMENT]} == {"test", "harder"}
    assert [name for name in SUITES["reasoning"].columns if name not in found] == []
    assert json.loads(json.dumps(found["curves"])) == found["curves"]
    plot_reasoning({"arithmetic": {"model": found}}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "| arithmetic | model |" in markdown(
        {"settings": {"model": "x"}, "results": {"reasoning": {"arithmetic": {"model": found}}}}
    )


def test_the_number_of_drafts_is_chosen_on_val_alone_and_within_the_cost_of_the_vote(run, pack, monkeypatch):
    """Each split has one way that is best; that of val is taken."""

    def way(*right, flops):
        return reasoning.Way(np.array(right, bool), flops)

    def every_way(run, questions, options, room):
        best = len(asked) == 0
        asked.append(questions)
        votes = {1: way(0, 0, 0, flops=10), 2: way(best, 1, 0, flops=20), 4: way(1, not best, 1, flops=40)}
        thought = {1: way(1, 0, 0, flops=30), 2: way(1, 1, not best, flops=39), 4: way(1, 1, 1, flops=41)}
        return {"one draft": {1: way(0, 0, 0, flops=10)}, "majority": votes, "rethinking": thought}

    asked = []
    monkeypatch.setattr(reasoning, "every_way", every_way)
    found = reasoning.reasoning(pack, Options(limit=3), run)
    assert found["chosen"] == {"one draft": 1, "majority": 2, "rethinking": 2}  # 2 and 4 of the vote are as good
    assert found["rethinking"] == 1
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["rethinking_above_majority"] == pytest.approx(2 / 3)
    assert found["rethinking_above_majority_p"] == 0.5  # two questions, both in favour
    assert found["over_budget"] == []
    assert len(asked) == 3


def test_votes_and_likelihoods(run, pack, monkeypatch):
    """One question of which the drafts are known."""
    texts = ["x#1", "y#2", "z#2", "no answer"]
    monkeypatch.setattr(reasoning, "_drafts", lambda run, questions, options, sampling, n: [texts[:n]])
    monkeypatch.setattr(reasoning, "_scores", lambda *_: np.array([[3.0, 4.0, 1.0, 0.0]]))
    loops = [[["x#1"], ["no"], ["y#2"], ["y#2"], ["z#2"]]]
    monkeypatch.setattr(reasoning, "_loops", lambda run, questions, options, sampling, n, chains: loops)
    found = reasoning.every_way(run, [reasoning.Question("1+1?", "2", 1)], Options(attempts=5), 10)
    right = {name: {n: bool(way.right_Q[0]) for n, way in ways.items()} for name, ways in found.items()}
    assert right["one draft"] == right["greedy"] == {1: False}
    assert right["majority"] == {1: False, 2: False, 4: True}  # of two answers as frequent the first
    assert right["best of N"] == {1: False, 2: False, 4: False}  # the likeliest draft has no answer
    assert right["rethinking"] == {1: False, 2: True, 4: True}


def test_a_name_of_somebody_elses_is_written_plainly(pack, tmp_path):
    for number, name in enumerate(("a/../b\0$\\x$", "x" * 300, "\ud800", "")):
        folder = tmp_path / str(number)
        shutil.copytree(pack, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["task"]["name"] = name
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (part,) = reasoning.parts(Options(directory=folder))
        assert re.fullmatch(r"[\w -]{1,40}", part.name)


def test_a_pack_with_documents_that_have_no_prompt_is_refused(pack, tmp_path):
    lines = [json.dumps({"prompt": f"{n}+1?", "completion": f"#{n + 1}"}) for n in range(60)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(['{"text": "1+1=2"}', *lines]))
    options = {"tokenizer": "bpe:257", "keep_together": "exact", "val_fraction": 0.2, "test_fraction": 0.2}
    made = ltm_pack([tmp_path / "mixed.jsonl"], tmp_path / "pack", **options)
    assert made.prompts == 60
    with pytest.raises(UsageError, match="is no pack with prompts"):
        reasoning.parts(Options(sources={"reasoning": str(tmp_path / "pack")}))


def test_two_packs_of_one_name_are_refused(pack, tmp_path):
    for name in ("easy", "hard"):
        shutil.copytree(pack, tmp_path / name)
    with pytest.raises(UsageError, match="the same row, 'arithmetic' of the suite reasoning"):
        evaluate_suites("no-run", ["reasoning"], Options(directory=tmp_path), tmp_path / "out")


def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ():
    first, second = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1, 1, 0], bool)
    assert mcnemar(first, second) == pytest.approx(2 * binom.cdf(1, 5, 0.5))
    assert mcnemar(first, first) == 1


def test_what_is_no_pack_of_problems_is_refused(pack, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no data for the suite reasoning: it looks for packs of problems"):
        reasoning.parts(Options(directory=tmp_path / "empty"))
    with pytest.raises(UsageError, match="is no pack with prompts and the splits val and test"):
        reasoning.parts(Options(sources={"reasoning": str(tmp_path / "empty")}))
