"""The ground every test stands on: shapes checked at every call, one seed, float64, and no flag left changed."""

import os
import random
import sys
import tempfile
import warnings

from beartype.roar import BeartypeDecorHintPep585DeprecationWarning as OldSpelling
from jaxtyping import install_import_hook

assert "ltm_pyro" not in sys.modules, "ltm_pyro was imported before its shape checks were on"

os.environ["OMP_NUM_THREADS"] = "1"  # in children too: `make test` has a process for every core
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp()  # the recipes trained in tests are not the user's own

warnings.simplefilter("ignore", OldSpelling)  # Pyro's distributions inherit from old spellings of `typing`
install_import_hook("ltm_pyro", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")  # int is a float

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pytest  # noqa: E402
import pytorch_lightning  # noqa: E402, F401 - before xarray, or `limit_val_batches: 1` is read as 1.0, all batches
import torch  # noqa: E402

from ltm_pyro.contracts import Batch, make_batch  # noqa: E402
from ltm_pyro.data.tokenizer import end_of_text, train_tokenizer, vocabulary_size  # noqa: E402
from ltm_pyro.guides import MeanField  # noqa: E402
from ltm_pyro.inference.state import LocalInference  # noqa: E402
from ltm_pyro.models.decoder import Decoder  # noqa: E402
from ltm_pyro.models.gaussian import GaussianPrior  # noqa: E402
from ltm_pyro.models.latent_thought import LatentThoughtModel  # noqa: E402
from ltm_pyro.runs.run import Run  # noqa: E402

pyro.enable_validation(True)
# a busy machine is no failure, and seeds are fixed
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and on a busy machine threads wait for each other

OUTSIDE = torch.get_default_dtype()  # of fixtures of a module or of the session

FLAGS = {  # name -> how to read it, how to put it back
    "torch default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch deterministic algorithms": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch threads": (torch.get_num_threads, torch.set_num_threads),
    "pyro settings": (pyro.settings.get, lambda before: pyro.settings.set(**before)),
}


def pytest_configure(config):
    """The same once more, for modules that a test is the first to import: pytest resets the filters."""
    config.addinivalue_line("filterwarnings", f"ignore::beartype.roar.{OldSpelling.__name__}")


@pytest.fixture(autouse=True)
def two_starts(request, monkeypatch):
    """Under a prior of several modes two starts and few draws, which laws for any number do not notice."""
    if request.node.path.name not in ("test_starts.py", "test_own_runs.py"):  # the latter compares with other processes
        for name, value in {"SEVERAL": 2, "POOL": 2, "SCORING": 4}.items():
            monkeypatch.setattr(f"ltm_pyro.inference.local.{name}", value)


@pytest.fixture(autouse=True)
def same_ground():
    """Every test starts from one seed, in float64, and fails when it leaves a global flag changed."""
    outside = torch.get_default_dtype()
    assert outside == OUTSIDE, "a fixture of a module left another default dtype to the tests behind it"
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = {name: read() for name, (read, _) in FLAGS.items()}
    yield
    after = {name: read() for name, (read, _) in FLAGS.items()}
    for name, (_, restore) in FLAGS.items():
        restore(before[name])
    torch.set_default_dtype(outside)
    changed = {name: (before[name], after[name]) for name in FLAGS if before[name] != after[name]}
    assert not changed, f"the test left global flags changed (before, after): {changed}"


@pytest.fixture
def tiny_decoder():
    """Makes a decoder of a few hundred parameters; any of its arguments can be changed by name."""

    def make(**changes) -> Decoder:
        tiny = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 2, "thoughts": 3, "window": 4, "length": 16}
        return Decoder(**tiny | changes)

    return make


@pytest.fixture
def tiny_model(tiny_decoder):
    """Makes a `LatentThoughtModel` of the paper's prior and a tiny decoder, changed by name."""

    def make(**changes) -> LatentThoughtModel:
        decoder = tiny_decoder(**changes)
        return LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)

    return make


@pytest.fixture
def tiny_batch():
    """Makes a batch of random tokens; sequence i is i tokens shorter than the first, and a token is two bytes."""

    def make(size: int = 3, length: int = 7, vocabulary: int = 11) -> Batch:
        lengths_B = (length - torch.arange(size)).clamp(min=1)
        tokens_BT = torch.randint(1, vocabulary, (size, length))
        return make_batch(tokens_BT, lengths_B, start_token=0, bytes_B=2 * lengths_B)

    return make


@pytest.fixture
def tiny_run(tiny_model):
    """Makes an untrained run of length 24, changed by name; its text is noise, as bytes can be."""

    def make(**changes) -> Run:
        texts = ["the old model reads a long text and writes short words about time, naïve café 😀"] * 3
        tokenizer = train_tokenizer(texts, 280)
        model = tiny_model(**{"vocabulary": vocabulary_size(tokenizer), "length": 24} | changes).eval()
        with torch.no_grad():
            model.decoder.embedding.weight[end_of_text(tokenizer)] = 0  # else it mostly follows itself, and ends there
            for block in model.decoder.blocks:
                if block.cross_attention is not None:
                    block.cross_attention.output.weight.mul_(8)  # so that thoughts matter
        return Run(model, MeanField(model), tokenizer, LocalInference(steps=3), "nowhere", model.decoder.length)

    return make
