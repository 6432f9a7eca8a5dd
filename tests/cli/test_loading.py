"""Loading a run builds a model, not a trainer; old keys of a recipe are refused by their new names."""

import subprocess
import sys
from inspect import signature

import pytest
import torch
import yaml

from ltm_pyro.errors import UsageError
from ltm_pyro.inference import check_prior
from ltm_pyro.models import latent_thought
from ltm_pyro.runs.load import load_run
from ltm_pyro.training.model_config import TRAINING_KEYS, build_from_recipe, build_model, parse_model
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.old_recipe_keys import RENAMED, dotted_keys, refuse_old_keys
from ltm_pyro.training.recipe import build_module, read_recipe, take_vocabulary

ONLY_TO_TRAIN = {"pytorch_lightning", "webdataset", "optuna"}


def with_key(recipe, key, value):
    """A recipe's text with one more dotted key."""
    content = yaml.safe_load(recipe)
    *above, last = key.replace("model.decoder.", "model.decoder.init_args.").split(".")
    inner = content
    for name in above:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    "code",
    [
        "import ltm_pyro; ltm_pyro.load_run",
        "import ltm_pyro; ltm_pyro.load_run(RUN)",
        "import ltm_pyro.data.tokenizer, ltm_pyro.data.manifest",
        "from ltm_pyro.cli import main\ntry: main(['evaluate', RUN, '--data', TEXT, '--limit', '2'])\n"
        "except SystemExit as end: assert end.code == 0",
    ],
    ids=["import", "load_run", "data", "evaluate"],
)
def test_what_only_training_needs_is_not_imported(run, tmp_path, code):
    text = tmp_path / "text.txt"
    text.write_text("the old people of every day")
    given = f"RUN, TEXT = {str(run)!r}, {str(text)!r}\n"
    found = f"\nimport sys; print('imported:', *({ONLY_TO_TRAIN} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-P", "-c", given + code + found], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_prior_is_checked_once(recipe, monkeypatch):
    config, calls = read_recipe(["--config", str(recipe)]), []
    take_vocabulary(config)

    def count(model, **options):
        calls.append(model)
        check_prior.check_prior(model, **options)

    monkeypatch.setattr(latent_thought, "check_prior", count)
    module = build_module(config)
    assert calls == [module.model]


def test_training_has_the_models_keys_and_its_own():
    own = [name for name, x in signature(LTMModule).parameters.items() if x.kind is not x.VAR_KEYWORD]
    assert sorted(own) == sorted([*TRAINING_KEYS, "seed"])
    assert not signature(build_model).parameters.keys() & {*own}


def test_a_runs_recipe_says_what_a_recipe_says(run):
    recipe = (run / "config.yaml").read_text()
    whole, part = read_recipe(["--config", str(run / "config.yaml")]), parse_model(recipe, run)
    assert part.data.directory == whole.data.directory
    assert all(part.model[name] == whole.model[name] for name in signature(build_model).parameters)
    built, trained = build_from_recipe(whole), load_run(run)
    assert [n for n, _ in built.model.named_parameters()] == [n for n, _ in trained.model.named_parameters()]
    with pytest.raises(UsageError, match="'colour'"):
        parse_model(with_key(recipe, "model.colour", "red"), run)
    for damaged in ("[1", "- 1", "run: 2", "model: 3", "model: {}\ndata:\n"):
        with pytest.raises(UsageError, match=f"recipe of {run} cannot be read"):
            parse_model(damaged, run)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_by_its_new_name(recipe, run, refused, tmp_path, old, new):
    sentence = f"`{old}` is now `{new}`"
    value = "true" if "decoder" in old else "{jitter: 0.1}"
    path = tmp_path / "recipe.yaml"
    path.write_text(with_key(recipe.read_text(), old, yaml.safe_load(value)))
    for command in (("fit", "--config", path), ("flops", "--config", path), ("show", path)):
        assert sentence in refused(*command)
    given = ("fit", "--config", recipe, "--run", tmp_path / "run")
    options = [(f"--{old}", value), (f"--{old}={value}",)]
    options += [(f"--{old.replace('decoder.', 'decoder.init_args.')}", value)]
    options += [] if "decoder" in old else [(f"--{old}.log_var", -1), (f"--{old}.log_var=-1",)]
    for option in options:
        assert sentence in refused(*given, *option)
    assert not (tmp_path / "run").exists()


def test_a_run_with_old_keys_says_all_of_them(run, refused, tmp_path):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    recipe = checkpoint["ltm_pyro"]["recipe"]
    for old, new in RENAMED.items():
        assert new.rpartition(".")[2] in recipe
        recipe = recipe.replace(f" {new.rpartition('.')[2]}:", f" {old.rpartition('.')[2]}:")
    checkpoint["ltm_pyro"]["recipe"] = recipe
    path = tmp_path / "old.ckpt"
    torch.save(checkpoint, path)
    for command in (("evaluate", path), ("generate", path), ("show", path), ("export", path, "--out", tmp_path / "x")):
        message = refused(*command)
        assert all(f"`{old}` is now `{new}`" in message for old, new in RENAMED.items())
        assert f"recipe of {path}" in message
        assert "rename them in it" in message


def test_keys_that_only_look_old_pass():
    refuse_old_keys(["model.inference.started", "model.start", *dotted_keys({"model": {"inference": {"init": {}}}})])
    refuse_old_keys(RENAMED.values())
