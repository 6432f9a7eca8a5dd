"""Priors and guides as Pyro users write them (`tests/own_parts.py`): each learns, or is refused in one sentence."""

import pytest
import torch
from pyro import poutine

from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.learning_rates import slow_parameters
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import LatentThoughtModel
from ltm_pyro.training.check_model import check_model, check_state
from tests import own_parts

INFERENCE = LocalInference(steps=2, rate=0.1, starts=2)
UNDER = ["Function", "Horseshoe", "Simplex"]  # priors that the guides are tried with: a statement, two sites, a simplex


@pytest.fixture
def make(tiny_decoder):
    """Makes the model of a prior by its name; equal weights at every call."""

    def make(name):
        decoder = tiny_decoder(thought_width=3)
        return LatentThoughtModel(getattr(own_parts, name)(decoder.thought_shape), decoder)

    return make


def checked(make, prior, guide):
    """Model and guide after everything that `ltm fit` asks before the first step."""
    model = make(prior)
    guide = getattr(own_parts, guide)(model) if guide != "MeanField" else MeanField(model)
    check_model(model, guide)
    check_state(model, lambda: make(prior))
    return model, guide


def test_there_are_enough_of_them():
    assert len(own_parts.PRIORS) + len(own_parts.REFUSED) >= 22
    assert len(own_parts.GUIDES) + len(own_parts.REFUSED_GUIDES) >= 12


PAIRS = [(prior, "MeanField") for prior in own_parts.PRIORS]
PAIRS += [(prior, guide) for prior in UNDER for guide in own_parts.GUIDES]


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_it_learns_is_saved_loaded_and_evaluated(prior, guide, make, tiny_batch):
    model, q = checked(make, prior, guide)
    batch, learned = tiny_batch(), dict(slow_parameters(model, q))
    before = {name: x.detach().clone() for name, x in learned.items()}
    svi = DualRateSVI(model, q, lambda name: {"lr": 0.05}, INFERENCE, corpus=10)
    losses = [svi.step(batch) for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    own = [name for name in learned if name.startswith(("prior.", "guide."))]
    assert own
    for name in own:
        assert (learned[name] != before[name]).any() == learned[name].requires_grad, name

    again, q_again = checked(make, prior, guide)
    again.load_state_dict(model.state_dict())
    if isinstance(q, torch.nn.Module):
        q_again.load_state_dict(q.state_dict())
    figures = []
    for pair in ((model, q), (again, q_again)):
        found = evaluate(*pair, [batch], INFERENCE, ["bound", "iwae", "prior"], samples=3, seed=1)
        assert not found.excluded
        figures.append({name: x.nats_per_token for name, x in found.estimates.items()})
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)


@pytest.mark.parametrize("prior", own_parts.PRIORS)
def test_the_figure_of_a_sequence_does_not_depend_on_its_batch(prior, make, tiny_batch):
    model = make(prior)
    batch, guide = tiny_batch(), MeanField(model)
    whole, _ = infer_local(model, guide, batch, INFERENCE, keys=RowKeys.of_batch(batch, 5))
    one = batch.select(torch.tensor([2]))
    alone, _ = infer_local(model, guide, one, INFERENCE, keys=RowKeys.of_batch(one, 5))
    for name, x in alone.parameters.items():
        torch.testing.assert_close(x[0], whole.parameters[name][2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prior", own_parts.REFUSED)
def test_a_prior_that_cannot_be_what_is_meant_is_refused(prior, make):
    with pytest.raises(UsageError, match=own_parts.REFUSED[prior]) as error:
        checked(make, prior, "MeanField")
    assert "\n" not in str(error.value)
    assert "own_parts.py:" in str(error.value)


@pytest.mark.parametrize("guide", own_parts.REFUSED_GUIDES)
def test_a_guide_that_cannot_be_what_is_meant_is_refused(guide, make):
    with pytest.raises(UsageError, match=own_parts.REFUSED_GUIDES[guide]) as error:
        checked(make, "Params", guide)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", own_parts.PRIORS)
def test_stock_pyro_traces_it_as_it_is(prior, make, tiny_batch):
    """The joint density of a trace is that of the sites, with stock `poutine` and without our engine."""
    model, batch = make(prior), tiny_batch()
    trace = poutine.trace(model).get_trace(batch)
    assert trace.log_prob_sum().isfinite()
    frozen = [name for name, x in model.named_parameters() if not x.requires_grad]
    assert frozen == (["prior.fixed"] if prior == "Frozen" else [])
