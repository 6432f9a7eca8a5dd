"""Masked diffusion from a user's side: trained, scored, resumed, exported, and written with, also into gaps."""

import json
from pathlib import Path

import pytest
import yaml

from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.configure import recipe_file
from ltm_pyro.text.generation import infill
from tests.cli.conftest import call

MODEL = {
    "decoder": {
        "class_path": "ltm_pyro.models.Denoiser",
        "init_args": {"layers": 2, "width": 16, "heads": 2, "length": 16},
    },
    "joint": "ltm_pyro.models.MaskedDiffusionModel",
    "guide": "ltm_pyro.guides.Masking",
    "slow": {"warmup": 0.0, "floor": 1.0},  # the same rate whatever the budget is
}
ONLY = "masked diffusion has a bound on -log p(x), and no p(x | z) to weight or to predict with"


@pytest.fixture(scope="module")
def diffusion_recipe(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("masked") / "recipe.yaml"
    trainer = {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1, "log_every_n_steps": 1}
    content = {"model": MODEL, "trainer": trainer, "data": {"directory": str(packed), "batch_size": 8}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def diffusion(diffusion_recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("masked") / "run"
    code, _, err = call("fit", "--config", diffusion_recipe, "--run", path)
    assert code == 0, err
    return path


def test_the_bound_is_the_only_figure_and_others_are_refused(ltm, refused, diffusion):
    found = json.loads(ltm("evaluate", diffusion, "--samples", 16, "--json")[1])
    bound = found["estimates"]["bound"]
    assert {*found["estimates"]} == {"bound"}
    assert {*found["unavailable"].values()} == {ONLY}
    assert bound["is_bound"]
    assert bound["kl_nats_per_token"] == 0
    assert 0 < bound["monte_carlo_stderr"] < bound["nats_per_token"]
    again = json.loads(ltm("evaluate", diffusion, "--samples", 16, "--estimators", "bound", "--json")[1])
    assert again["estimates"]["bound"] == bound
    table = ltm("evaluate", diffusion, "--samples", 16)[1]
    assert "Of the error of bound," in " ".join(table.split())
    for name in ("iwae", "causal", "prior", "shuffled"):
        assert f"No figure for {name}: {ONLY}; ask for bound." in refused("evaluate", diffusion, "--estimators", name)


def test_it_goes_on_where_it_stopped(ltm, diffusion, diffusion_recipe, tmp_path):
    base = ("fit", "--config", diffusion_recipe, "--run", tmp_path / "run")
    assert ltm(*base, "--trainer.max_steps", 3)[0] == 0
    assert ltm(*base, "--ckpt_path", "last")[0] == 0
    columns = [(path / "metrics.csv").read_text().splitlines() for path in (diffusion, tmp_path / "run")]
    head = columns[0][0].split(",")
    names = [head.index(name) for name in ("step", "train/loss", "val/bound")]
    kept = [[[line.split(",")[i] for i in names] for line in lines[1:]] for lines in columns]
    assert kept[0] == kept[1]


def test_texts_are_written_and_gaps_are_filled(ltm, refused, diffusion):
    prompt = ("--prompt", "the old model", "--num-samples", 3, "--json")
    texts = json.loads(ltm("generate", diffusion, *prompt, "--seed", 1)[1])["samples"]
    assert len(texts) == 3
    assert texts == json.loads(ltm("generate", diffusion, *prompt, "--seed", 1)[1])["samples"]
    assert texts != json.loads(ltm("generate", diffusion, *prompt, "--seed", 1, "--denoising-steps", 1)[1])["samples"]
    filled = json.loads(ltm("generate", diffusion, "--infill", "the [[2]] model[[3]]", "--num-samples", 2, "--json")[1])
    assert filled["infill"] == "the [[2]] model[[3]]"
    assert all(text.startswith("the ") and " model" in text for text in filled["samples"])
    assert filled["samples"][:1] == infill(load_run(diffusion), ["the ", 2, " model", 3], seed=0)
    no_meaning = "has no meaning for MaskedDiffusionModel, which has no thoughts and fills gaps in a random order"
    for option, value, name in (
        ("--candidates", 2, "candidates"),
        ("--refit-every", 2, "refit_every"),
        ("--layers", 1, "layers"),
        ("--compile", None, "compile"),
        ("--stream", None, "stream"),
        ("--repetition-penalty", 2, "repetition_penalty"),
    ):
        assert f"{name} {no_meaning}" in refused(
            "generate", diffusion, *([option] if value is None else [option, value])
        )
    assert "no thoughts to interpolate between" in refused(
        "generate", diffusion, "--interpolate", "a", "b", "--num-samples", 2
    )
    assert "no gap to fill" in refused("generate", diffusion, "--infill", "the model")
    assert "at least one token" in refused("generate", diffusion, "--infill", "the [[0]] model")
    assert "the model's length is 16" in refused("generate", diffusion, "--infill", "the [[40]] model")
    assert "--infill does not go with --prompt" in refused(
        "generate", diffusion, "--infill", "a [[2]]", "--prompt", "a"
    )


def test_other_runs_fill_no_gaps(refused, run):
    assert "writes from left to right" in refused("generate", run, "--infill", "the [[2]] model")
    assert "writes from left to right" in refused("generate", run, "--denoising-steps", 2)


def test_an_export_and_the_count_of_flops_are_as_of_any_model(ltm, diffusion, tmp_path):
    assert ltm("export", diffusion, "--out", tmp_path / "export")[0] == 0
    scored = ("--samples", 8, "--limit", 4, "--estimators", "bound", "--json")
    data = ("--data", load_run(diffusion).data)
    first = json.loads(ltm("evaluate", diffusion, *scored)[1])
    assert first["estimates"] == json.loads(ltm("evaluate", tmp_path / "export", *data, *scored)[1])["estimates"]
    found = json.loads(ltm("flops", "--config", diffusion / "config.yaml", "--json")[1])
    assert found["fast_flops_per_token"] == 0 < found["slow_flops_per_token"]
    code, out, err = ltm("show", diffusion, "--svg", tmp_path / "plates.svg")
    assert code == 0, err
    assert "mask_order" in out


@pytest.mark.parametrize(
    "command",
    [
        ("posterior", "--input", "text.txt", "--out", "x.nc"),
        ("calibrate", "--simulations", 2, "--samples", 9),
        ("check-inference",),
    ],
    ids=lambda x: x[0],
)
def test_what_needs_thoughts_says_so(ltm, diffusion, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the old model")
    code, out, err = ltm(command[0], diffusion, *command[1:])
    assert (code, out) == (2, "")
    assert "The run has no thoughts (K = 0)" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["masked-diffusion.yaml", "autoregressive.yaml"])
def test_the_recipes_are_those_of_cpu_small_but_for_the_model(name):
    theirs, ours = (yaml.safe_load(Path(recipe_file(x)).read_text()) for x in ("cpu-small.yaml", name))
    assert ours["data"] == theirs["data"]
    assert ours["model"]["max_flops"] == theirs["model"]["max_flops"]
    arguments = ours["model"]["decoder"]["init_args"]
    assert all(arguments[key] == theirs["model"]["decoder"]["init_args"][key] for key in ("layers", "width", "heads"))
    assert arguments.get("window", arguments["length"]) == arguments["length"]
