"""A packed corpus, a recipe that is never trained, and studies whose objectives cost nothing."""

import json
import random

import pytest
import torch
import yaml

from ltm_pyro.data import pack
from ltm_pyro.studies.search import study as search
from ltm_pyro.studies.search import trials

DECODER = {"layers": 2, "width": 16, "heads": 2, "thoughts": 2, "window": 4, "length": 16}
RESOURCES = ("memory_gib", "workers", "trial_seconds", "seconds")
FREE = """
'''Where is the valley?'''
from optuna.distributions import FloatDistribution, CategoricalDistribution
space = {"model.inference.rate": FloatDistribution(0.1, 1.0), "model.inference.steps": CategoricalDistribution([2, 4])}
figures = ["size"]
def objective(setting):
    p = setting.parameters
    rate = p.get("model.inference.rate", 0.5)
    return {"bound": (rate - 0.3) ** 2, "inference_flops_per_token": 1 / rate, "size": 10 * rate}
"""


@pytest.fixture(autouse=True)
def float32(same_ground):
    """As the command line."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A recipe for a decoder of a few thousand parameters, beside its packed data."""
    folder = tmp_path_factory.mktemp("study")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["some", "words", "come", "over", "and", "over"], k=40)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"rows": "stream", "test_fraction": 0.0}  # every step has as many tokens
    pack([folder / "text.jsonl"], folder / "data", tokenizer="bpe:270", seq_len=16, val_fraction=0.2, **options)
    content = {
        "model": {
            "decoder": {"class_path": "ltm_pyro.models.Decoder", "init_args": DECODER},
            "inference": {"steps": 2},
            "evaluation": {"steps": 2, "rate": 0.1},
        },
        "data": {"directory": str(folder / "data"), "batch_size": 4},
        "trainer": {"log_every_n_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def study_file(tmp_path):
    """Writes a study's file."""

    def write(text=FREE, name="valley"):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """Runs a study to the end in this process, its trials in their own; returns what `describe` says."""
    monkeypatch.setattr(trials, "HEARTBEAT", 1)
    monkeypatch.setattr(trials, "GRACE", 120)

    def run_to(
        total, source, storage="studies.db", repeats=0, finalists=1, name=None, warm_start=None, given=None, **options
    ):
        url = storage if "://" in storage else f"sqlite:///{tmp_path / storage}"
        resources = {x: options.pop(x) for x in RESOURCES if x in options}
        planned = {"budget": "4e9flops", "at_most": {}, "limit": 4, "samples": 2} | options
        definition, plan = search.prepare(str(source), str(recipe), given or {}, **planned)
        resources = search.Resources(out=tmp_path / "out", **resources)
        name = name or plan.study
        search.run_study(definition, plan, url, name, total, resources, repeats, finalists, warm_start)
        return search.describe(url, name, tmp_path / "out")

    return run_to


def trial(number, x, value, seed=0, **about):
    """A trial as a row, as `describe` has it."""
    row = {"number": number, "role": "trial", "state": "complete", "within_limits": True, "max_flops": None}
    row |= {"parameters": {"x": x}, "figures": {"bound": value}, "seed": seed, "of": None, "repeat": None}
    return row | about
