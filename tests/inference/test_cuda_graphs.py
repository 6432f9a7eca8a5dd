"""CUDA graph capture, with a stand-in on the CPU that runs the captured function; see `tests/test_gpu.py`."""

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

INFERENCE = LocalInference(steps=3, rate=0.1, slow_gradient="last", cuda_graph=True, starts=1)


@pytest.fixture
def captured(monkeypatch):
    """The list of captured functions; a replay runs the function again on the captured buffers."""
    runs = []
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda run: runs.append(run) or run)
    return runs


def assert_equal(actual, expected):
    for a, b in zip(graphs.tree_flatten(actual)[0], graphs.tree_flatten(expected)[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_a_replayed_fit_equals_the_fit_without_a_graph(prior, guide, tiny_decoder, tiny_batch, captured):
    decoder = tiny_decoder(thoughts=1, thought_width=2)
    model = LatentThoughtModel(make_prior(prior, decoder.thought_shape), decoder)
    family = make_guide(guide, model)
    for seed in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.01  # other memory and other values
        batch = tiny_batch()
        with seeded(seed):
            replayed = infer_local(model, family, batch, INFERENCE)
        with seeded(seed):
            assert_equal(replayed, infer_local(model, family, batch, replace(INFERENCE, cuda_graph=False)))
    assert len(captured) == family.uses_fast_steps  # True is one capture, False is none


def test_a_training_step_with_a_graph_has_the_same_gradient(tiny_model, tiny_batch, captured):
    model, batch = tiny_model(), tiny_batch()
    guide, gradients = MeanField(model), {}
    for rate in (0.1, 0.2, 0.3):  # a new rate needs no new capture
        for graph in (True, False):
            model.zero_grad()
            with seeded(0):
                training_loss(model, guide, batch, replace(INFERENCE, rate=rate, cuda_graph=graph)).loss.backward()
            gradients[graph] = [p.grad for p in model.parameters()]
        assert_equal(gradients[True], gradients[False])
    assert len(captured) == 1


def test_shapes_that_change_at_every_call_are_not_captured(tiny_model, tiny_batch, captured):
    model = tiny_model()
    guide = MeanField(model)
    for length in range(4, 4 + 2 * graphs.MAX_GRAPHS):
        infer_local(model, guide, tiny_batch(length=length), INFERENCE)
    assert not captured
    assert len(graphs.graph_cache(guide, torch.device("cpu")).graphs) == graphs.MAX_GRAPHS


def test_a_replay_does_not_overwrite_earlier_results(tiny_model, tiny_batch, captured):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    states = [infer_local(model, guide, batch, INFERENCE)[0] for _ in range(4)]
    assert len(captured) == 1
    assert not torch.equal(states[2].parameters["z_loc"], states[3].parameters["z_loc"])


def test_options_that_a_graph_does_not_support_are_refused(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    with pytest.raises(UsageError, match="batch is on cpu: remove `cuda_graph`"):
        infer_local(model, guide, batch, INFERENCE)
    with pytest.raises(UsageError, match="set slow_gradient to last"):
        training_loss(model, guide, batch, replace(INFERENCE, slow_gradient="trajectory"))
    for options in ({"stop": Stop()}, {"noise": "reused"}):
        with pytest.raises(UsageError, match="or `cuda_graph`"):
            replace(INFERENCE, **options)
