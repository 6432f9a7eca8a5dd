"""Loading and scoring leave torch's generator alone; making a guide leaves nothing in Pyro's global store."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import ltm_pyro.guides
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.inference.local import init
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LatentThoughtModel, LearnedGaussianPrior
from ltm_pyro.runs.load import load_run
from ltm_pyro.text.scoring import Scoring, score
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.train import train


@pytest.mark.parametrize(
    "use",
    [
        lambda path: load_run(path),
        lambda path: evaluate_run(load_run(path), limit=3, samples=2),
        lambda path: evaluate_run(load_run(path), limit=3, samples=2, estimators=["causal", "iwae"]),
        lambda path: score(load_run(path), ["the old day"]),
    ],
)
def test_torchs_global_generator_stays_where_it_was(run, use):
    before = torch.get_rng_state()
    use(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_leaves_signals_as_they_were(recipe, tmp_path):
    """Lightning's own handler stayed, and made what followed in the process deaf to SIGTERM."""
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    words = ("--run", str(tmp_path / "run"), "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
    train(read_recipe(["--config", str(recipe), *words]))
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before


def test_two_threads_load_and_score_a_run_as_one_does(run):
    def use(seed):
        return [score(load_run(run), ["the old day"], Scoring(samples=2, seed=seed)) for _ in range(3)]

    serial = [use(0), use(1)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(use, range(2))] == serial
    assert torch.equal(torch.get_rng_state(), before)


def learned_model(tiny_decoder):
    decoder = tiny_decoder()
    return LatentThoughtModel(LearnedGaussianPrior(decoder.thought_shape), decoder)


@pytest.mark.parametrize("name", ltm_pyro.guides.__all__)
def test_a_guide_leaves_pyros_store_empty(tiny_decoder, name):
    getattr(ltm_pyro.guides, name)(learned_model(tiny_decoder))
    assert list(pyro.get_param_store()) == []


def test_stock_svi_trains_the_prior_of_a_second_model(tiny_decoder, tiny_batch):
    torch.set_default_dtype(torch.float64)
    batch = tiny_batch()
    ltm_pyro.guides.MeanField(learned_model(tiny_decoder))
    model = learned_model(tiny_decoder)
    guide = ltm_pyro.guides.MeanField(model)
    q = LocalPosterior(guide, init(model, guide, batch, LocalInference()))
    before = {name: x.detach().clone() for name, x in model.prior.named_parameters()}
    svi = SVI(model, q, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(2):
        svi.step(batch)
    assert before
    for name, x in model.prior.named_parameters():
        assert not torch.equal(x, before[name]), name
