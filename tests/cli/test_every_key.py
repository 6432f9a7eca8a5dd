"""Every key of a recipe that a search may vary changes the training; those that may not have a reason here."""

import json
import re
from functools import cache

import pytest
import torch

from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.train import train
from tests.usage import ROOT, recipe_keys

VALUES = {  # key -> a value that is not the base recipe's
    "Amortized.heads": 2,
    "Amortized.layers": 1,
    "Amortized.width": 64,
    "Amortized.window": 2,
    "AutoregressivePrior.components": 3,
    "AutoregressivePrior.heads": 1,
    "AutoregressivePrior.layers": 1,
    "AutoregressivePrior.spread": 2.0,
    "AutoregressivePrior.width": 32,
    "EnergyPrior.contrast": 8,
    "EnergyPrior.step_size": 0.3,
    "EnergyPrior.steps": 3,
    "EnergyPrior.width": 16,
    "FlowGuide.bins": 4,
    "FlowPrior.kind": "affine",
    "FlowPrior.transforms": 2,
    "FlowPrior.width": 16,
    "HierarchicalPrior.topic": 3,
    "LowRank.rank": 1,
    "MixturePrior.components": 3,
    "MixturePrior.spread": 1.0,
    "SparsePrior.tau": 0.5,
    "TransportPrior.heads": 1,
    "TransportPrior.layers": 1,
    "TransportPrior.width": 32,
    "data.batch_size": 5,
    "data.tokens": 64,
    "model.curriculum.flops_per_token": [[0, 3e5], [1, 1e6]],
    "model.curriculum.kl_weight": [[0, 0.1], [1, 1]],
    "model.curriculum.log_var": [[0, -3], [1, 0]],
    "model.curriculum.particles": [[0, 2], [1, 2]],
    "model.curriculum.rate": [[0, 0.1], [1, 0.3]],
    "model.curriculum.steps": [[0, 1], [1, 3]],
    "model.decoder.constant_thoughts": 2,
    "model.decoder.heads": 1,
    "model.decoder.kv_heads": 1,
    "model.decoder.layers": 1,
    "model.decoder.position_embeddings": True,
    "model.decoder.thought_keys": "learned",
    "model.decoder.thought_layers": [1],
    "model.decoder.thought_width": 8,
    "model.decoder.thoughts": 3,
    "model.decoder.width": 8,
    "model.decoder.window": 2,
    "model.decoder.zero_init_cross_attention": True,
    "model.guide": "ltm_pyro.guides.FullCovariance",
    "model.inference.init.jitter": 0.5,
    "model.inference.init.log_var": -2.0,
    "model.inference.kl": "path",
    "model.inference.kl_weight": 0.5,
    "model.inference.noise": "reused",
    "model.inference.optimizer": "sgd",
    "model.inference.particles": 2,
    "model.inference.rate": 0.05,
    "model.inference.schedule": "constant",
    "model.inference.slow_gradient": "last",
    "model.inference.starts": 3,
    "model.inference.steps": 4,
    "model.inference.stop.tolerance": 1e6,
    "model.inference.stop.window": 1,
    "model.inference.use_thoughts": False,
    "model.keep_local": "memory",
    "model.max_flops": 5e7,
    "model.prior": "ltm_pyro.models.LearnedGaussianPrior",
    "model.slow.betas": [0.5, 0.6],
    "model.slow.floor": 0.9,
    "model.slow.prior_rate": 0.1,
    "model.slow.rate": 1e-2,
    "model.slow.warmup": 0.5,
    "model.slow.weight_decay": 0.9,
    "seed_everything": 5,
}
DEEPER = {"model.inference.steps": 4}  # the decoder follows the q before each step, and the first KL is 0
STOPPING = {"model.inference.steps": 8, "model.inference.slow_gradient": "last"}
BASES = {  # what a key needs beside itself
    "model.curriculum.flops_per_token": {"model.inference.steps": 1},
    "AutoregressivePrior.spread": {
        "model.prior": "ltm_pyro.models.AutoregressivePrior",
        "model.prior.components": 3,
    },
    "model.decoder.constant_thoughts": {"model.decoder.thoughts": 0},
    "data.tokens": {"data.batch_size": "null", "data.tokens": 128},
    "model.inference.kl": DEEPER,
    "model.inference.kl_weight": DEEPER,
    "model.curriculum.kl_weight": DEEPER,
    "model.inference.schedule": {"model.inference.steps": 4, "model.inference.schedule": "cosine"},
    "model.inference.stop.tolerance": STOPPING
    | {"model.inference.stop.window": 1, "model.inference.stop.tolerance": 0.01},
    "model.inference.stop.window": STOPPING
    | {"model.inference.stop.window": 3, "model.inference.stop.tolerance": 30.0},
    "model.keep_local": {"data.batch_size": 600},  # more than one epoch
    "model.slow.prior_rate": {"model.prior": "ltm_pyro.models.LearnedGaussianPrior"},
}
WITHOUT_EFFECT = {  # key -> why no training shows it
    "checkpoints.every": "when it is saved",
    "checkpoints.keep": "what is kept",
    "ConditionalPrior.label": "for documents with labels: tests/cli/test_labels.py",
    "ConditionalPrior.levels": "for documents with labels: tests/cli/test_labels.py",
    "GroupedPrior.label": "for documents with labels: tests/cli/test_labels.py",
    "GroupedPrior.levels": "for documents with labels: tests/cli/test_labels.py",
    "ckpt_path": "where it goes on from",
    "data.cache": "where shards lie",
    "data.directory": "the data themselves",
    "data.observe": "for documents with a prompt: tests/training/test_module.py",
    "data.on_damage": "only damaged data",
    "data.score": "for documents with a prompt: tests/training/test_module.py",
    "data.workers": "who reads, not what",
    "force": "what may be replaced",
    "model.compile": "the same mathematics, faster",
    "model.decoder.attention": "the same mathematics, by another kernel",
    "model.decoder.length": "the most that fits; positions are relative",
    "model.decoder.recompute": "less memory",
    "model.decoder.vocabulary": "the data's",
    "model.evaluation": "validation",
    "model.inference.cuda_graph": "the same mathematics, faster",
    "model.joint": "a model of the user's own in place of prior and decoder",
    "model.on_nonfinite": "only where something is not finite",
    "model.vocabulary": "the data's",
    "run": "where it is written",
    "trust": "what may be executed",
    "warm_start": "another run's weights",
}


def options_of(key, value):
    """A key's options; that of a prior or guide follows the choice of its class."""
    owner, _, argument = key.partition(".")
    if not owner[0].isupper():
        return {key: value}
    part, room = ("prior", "models") if owner.endswith("Prior") else ("guide", "guides")
    return {f"model.{part}": f"ltm_pyro.{room}.{owner}"} | (
        {} if value is None else {f"model.{part}.{argument}": value}
    )


@pytest.fixture(scope="module")
def weights(recipe, tmp_path_factory):
    """Trains four steps with some options, once for each; the weights at the end."""
    run = tmp_path_factory.mktemp("every-key") / "run"

    @cache
    def trained(options):
        words = ["--config", str(recipe), "--run", str(run), "--force", "--trainer.limit_val_batches", "0"]
        words += ["--model.slow.warmup", "0.0", "--trainer.max_steps", "4"]
        for key, value in options:
            words += [f"--{key}", value]
        torch.set_default_dtype(torch.float32)
        try:
            path = train(read_recipe(words))
        finally:
            torch.set_default_dtype(torch.float64)
        state = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return {name: x for name, x in state.items() if name != "flops"}

    return lambda options: trained(tuple((k, x if isinstance(x, str) else json.dumps(x)) for k, x in options.items()))


def test_what_is_tested_elsewhere_is():
    """A reason that names a test names one that is there, and that speaks of the key."""
    for key, reason in WITHOUT_EFFECT.items():
        for file in re.findall(r"tests/\S+\.py", reason):
            assert key.rpartition(".")[2] in (ROOT / file).read_text(), key


def test_every_key_is_here():
    assert {*VALUES} | {*WITHOUT_EFFECT} == {*recipe_keys()}
    assert not {*VALUES} & {*WITHOUT_EFFECT}


@pytest.mark.parametrize("key", VALUES)
def test_a_key_changes_the_training(weights, key):
    base = BASES.get(key, {})
    if key[0].isupper():
        base = base | options_of(key, None)
    before, after = weights(base), weights(base | options_of(key, VALUES[key]))
    same = before.keys() == after.keys() and all(
        x.shape == after[name].shape and torch.equal(x, after[name]) for name, x in before.items()
    )
    assert not same
