"""A fit on any device, shown on torch's ``meta``: it has no memory to read, and mixes with no other device.

A tensor made elsewhere, and a value the host wants to see (``item``, ``if tensor``), are errors there; on CUDA the
second is a wait. Autocast, compilers and sparse gradients do not reach ``meta``: see `tests/test_gpu.py`. Shapes as in
the package.
"""

import pytest
import torch
import torch.nn.functional as F

from ltm_pyro.contracts import make_batch
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.inference.elbo import Draws, elbo_terms, log_weights
from ltm_pyro.inference.estimators import ESTIMATORS
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, LatentThoughtModel
from tests.laws import PAIRS, make_guide, make_prior

B, T = 3, 7
OPTIONS = [
    {},
    {"slow_gradient": "last"},
    {"kl": "path"},
    {"noise": "reused", "optimizer": "sgd", "schedule": "constant"},
    {"noise": "antithetic", "particles": 2, "optimizer": "adamw"},
    {"optimizer": "natural"},
]


@pytest.fixture
def stage(monkeypatch):
    """Inside, nothing asks for what ``meta`` does not have."""
    off, dense = torch.autocast("cpu", enabled=False), F.embedding
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: off)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr("ltm_pyro.nn.attention.backend", lambda *case: "sdpa")
    monkeypatch.setattr("ltm_pyro.nn.cross_entropy_autograd.kernel", lambda function, device: function)
    monkeypatch.setattr(F, "embedding", lambda x, weight, *more, sparse=False: dense(x, weight, *more))


@pytest.fixture
def nowhere(stage):
    """Makes a model, a guide and a batch on ``meta``."""

    def make(prior="GaussianPrior", guide="MeanField"):
        decoder = Decoder(11, layers=2, width=8, heads=2, thoughts=1, window=4, length=16, thought_width=2)
        model = LatentThoughtModel(make_prior(prior, decoder.thought_shape), decoder)
        made = make_guide(guide, model)
        for part in (model, made):
            if isinstance(part, torch.nn.Module):
                part.to("meta")
        tokens_BT = torch.empty(B, T, dtype=torch.long, device="meta")
        return model, made, make_batch(tokens_BT, tokens_BT[:, 0], start_token=0)

    return make


def test_the_stage_sees_what_it_should(nowhere):
    model, guide, batch = nowhere()
    with pytest.raises(RuntimeError, match="item"):
        bool(batch.tokens_B.sum() > 0)
    with pytest.raises(RuntimeError, match="device"):
        elbo_terms(model, guide, batch, {"z_loc": torch.zeros(B, 2, 1, 2), "z_log_var": torch.zeros(B, 2, 1, 2)})


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_no_fit_waits_or_leaves_its_device(prior, guide, nowhere):
    model, guide, batch = nowhere(prior, guide)
    state, info = infer_local(model, guide, batch, LocalInference(steps=2))
    terms = elbo_terms(model, guide, batch, state.parameters, Draws(2))
    held = [*state.parameters.values(), state.steps_B, info.elbo_NB, info.is_finite_B, terms.elbo_B]
    if guide.has_density:
        held.append(log_weights(model, guide, batch, state.parameters, 2))
    assert {x.device.type for x in held} == {"meta"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("prior", "guide"), [pair for pair in PAIRS if pair[1] in ("MeanField", "BlockCovariance")])
def test_no_training_step_waits_or_leaves_its_device(prior, guide, options, nowhere):
    model, guide, batch = nowhere(prior, guide)
    learned = training_loss(model, guide, batch, LocalInference(steps=2, **options))
    learned.loss.backward()
    assert learned.is_finite_B.device.type == "meta"
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}


def test_decoding_goes_on_without_a_wait(nowhere):
    model, _, batch = nowhere()
    with torch.no_grad():
        cache = model.decoder.init_cache(torch.empty(B, *model.decoder.thought_shape, device="meta"))
        for tokens_BU in (batch.inputs_BT, batch.inputs_BT[:, :1]):
            assert model.decoder.decode_step(tokens_BU, cache).device.type == "meta"


def test_a_run_is_scored_where_it_is(stage, tiny_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a short text about time. " * 9)
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # the figures, and only they
        evaluate_run(tiny_run().to("meta"), str(text), [*ESTIMATORS], samples=2, limit=2, temperatures=2)
