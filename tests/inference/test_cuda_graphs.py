"""Recorded fits, with a capture that computes on the CPU what a CUDA graph would launch; see `tests/test_gpu.py`."""

from dataclasses import replace

import pytest
import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference import cuda_graphs as graphs
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference, Stop
from ltm_pyro.models import LatentThoughtModel
from ltm_pyro.utils.rng import seeded
from tests.laws import PAIRS, make_guide, make_prior

INFERENCE = LocalInference(steps=3, rate=0.1, slow_gradient="last", cuda_graph=True)


@pytest.fixture
def captured(monkeypatch):
    """Counts what is recorded; a replay computes it anew from the places where it was recorded."""
    runs = []
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda run: runs.append(run) or run)
    return runs


def same(ours, theirs):
    for a, b in zip(graphs.tree_flatten(ours)[0], graphs.tree_flatten(theirs)[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_a_replayed_fit_is_the_fit(prior, guide, tiny_decoder, tiny_batch, captured):
    decoder = tiny_decoder(thoughts=1, thought_width=2)
    model = LatentThoughtModel(make_prior(prior, decoder.thought_shape), decoder)
    family = make_guide(guide, model)
    for seed in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.01  # elsewhere, and something else
        batch = tiny_batch()
        with seeded(seed):
            ours = infer_local(model, family, batch, INFERENCE)
        with seeded(seed):
            same(ours, infer_local(model, family, batch, replace(INFERENCE, cuda_graph=False)))
    assert len(captured) == family.uses_fast_steps  # otherwise there are no fast steps to record


def test_a_training_step_is_the_training_step(tiny_model, tiny_batch, captured):
    model, batch = tiny_model(), tiny_batch()
    guide, gradients = MeanField(model), {}
    for rate in (0.1, 0.2, 0.3):  # moves without being recorded anew
        for graph in (True, False):
            model.zero_grad()
            with seeded(0):
                training_loss(model, guide, batch, replace(INFERENCE, rate=rate, cuda_graph=graph)).loss.backward()
            gradients[graph] = [p.grad for p in model.parameters()]
        same(gradients[True], gradients[False])
    assert len(captured) == 1


def test_what_changes_every_time_is_not_recorded(tiny_model, tiny_batch, captured):
    model = tiny_model()
    guide = MeanField(model)
    for length in range(4, 4 + 2 * graphs.KEPT):
        infer_local(model, guide, tiny_batch(length=length), INFERENCE)
    assert not captured
    assert len(graphs.recordings(guide, torch.device("cpu")).seen) == graphs.KEPT


def test_results_stay_when_the_next_replay_comes(tiny_model, tiny_batch, captured):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    states = [infer_local(model, guide, batch, INFERENCE)[0] for _ in range(4)]
    assert len(captured) == 1
    assert not torch.equal(states[2].parameters["z_loc"], states[3].parameters["z_loc"])


def test_what_a_graph_cannot_do_is_said(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    with pytest.raises(UsageError, match="batch is on cpu: remove `cuda_graph`"):
        infer_local(model, guide, batch, INFERENCE)
    with pytest.raises(UsageError, match="set slow_gradient to last"):
        training_loss(model, guide, batch, replace(INFERENCE, slow_gradient="trajectory"))
    for options in ({"stop": Stop()}, {"noise": "reused"}):
        with pytest.raises(UsageError, match="or `cuda_graph`"):
            replace(INFERENCE, **options)
