"""`DualRateSVI` against `pyro.infer.SVI`, step by step."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.nn import PyroModule

from ltm_pyro.contracts import Init
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import init
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import LatentThoughtModel


def rates(name):
    return {"lr": 0.3, "betas": (0.9, 0.99)} if name.startswith("local.") else {"lr": 4e-3}


def test_one_fast_step_with_persistent_local_parameters_equals_pyros_svi(tiny_model, tiny_batch):
    batch, inference = tiny_batch(), LocalInference(steps=1, init=Init(log_var=-5.0))
    torch.manual_seed(0)
    ours, theirs = tiny_model(), tiny_model()
    theirs.load_state_dict(ours.state_dict())
    state = init(ours, MeanField(ours), batch, inference)

    svi = DualRateSVI(ours, MeanField(ours), rates, inference)
    svi.state = state
    posterior = LocalPosterior(MeanField(theirs), state)
    pyro_svi = SVI(theirs, posterior, pyro.optim.Adam(rates), TraceMeanField_ELBO())
    for step in range(10):
        pyro.set_rng_seed(step)
        loss = svi.step(batch, svi.state)
        pyro.set_rng_seed(step)
        assert loss == pytest.approx(pyro_svi.step(batch), abs=1e-6)
    for name, value in svi.state.parameters.items():
        torch.testing.assert_close(value, getattr(posterior, name).detach(), atol=1e-6, rtol=0)
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, dict(theirs.named_parameters())[name], atol=1e-6, rtol=0)


def test_training_lowers_the_loss_and_evaluation_does_not_train(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    svi = DualRateSVI(
        model,
        MeanField(model),
        lambda name: {"lr": 0.1 if name.startswith("local.") else 1e-2},
        LocalInference(steps=4),
    )
    first = svi.evaluate_loss(batch)
    for _ in range(20):
        svi.step(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert svi.evaluate_loss(batch) < first
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name])


def test_local_parameters_are_known_by_what_they_are(tiny_decoder, tiny_batch):
    """A site of another name learns at the fast rate, in `DualRateSVI` and in stock Pyro; the prior's are global."""

    class Prior(PyroModule):
        def __init__(self, shape):
            super().__init__()
            self.z_mean = torch.nn.Parameter(torch.zeros(*shape))

        def forward(self):
            return pyro.sample("thoughts", pyro.distributions.Normal(self.z_mean, 1.0).to_event(3))

    decoder, batch, asked = tiny_decoder(), tiny_batch(), {}
    model = LatentThoughtModel(Prior(decoder.thought_shape), decoder)
    guide = MeanField(model)

    def rates(name):
        return asked.setdefault(name, {"lr": 0.3 if name.startswith("local.") else 1e-3})

    svi = DualRateSVI(model, guide, rates, LocalInference(steps=1))
    first = init(model, guide, batch, LocalInference()).parameters["thoughts_loc"]
    svi.step(batch)
    assert (svi.state.parameters["thoughts_loc"] - first).abs().max() > 0.2
    assert {name for name, x in asked.items() if x["lr"] == 0.3} == {"local.thoughts_loc", "local.thoughts_log_var"}
    assert "prior.z_mean" in asked
    ours = {*asked}
    asked.clear()
    posterior = LocalPosterior(guide, svi.state)
    SVI(model, posterior, pyro.optim.Adam(rates), TraceMeanField_ELBO()).step(batch)
    assert {name for name in asked if name.startswith("local.")} == {name for name in ours if name.startswith("local.")}


def test_predictive_draws_from_the_fitted_q(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    posterior = LocalPosterior(guide, init(model, guide, batch, LocalInference(init=Init(log_var=-40.0))))
    drawn = Predictive(model, guide=posterior, num_samples=5)(batch._replace(targets_BT=None))
    assert drawn["tokens"].shape == (5, *batch.targets_BT.shape)
    assert drawn["z"].shape == (5, batch.size, 2, 3, 8)
    assert drawn["z"].std() < 1e-6


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("local.z_", {}, r"The rates give local.z_loc \{\}, without lr: give it"),
        ("decoder.", {"eps": 1e-8}, r"The rates give decoder\.\S+ \{'eps': 1e-08\}, without lr"),
        (
            "decoder.",
            {"lr": 1e-3, "weight_decy": 0.1},
            "the argument 'weight_decy', which .* not know: choose from lr, ",
        ),
        (
            "local.z_",
            {"lr": 0.3, "weight_decay": 0.1},
            "the argument 'weight_decay', which its optimizer does not know",
        ),
        ("local.z_", {"lr": math.nan}, "the lr nan: give a finite number"),
        ("decoder.", {"lr": "4e-4"}, "the lr '4e-4': give a finite number"),
        ("decoder.", 4e-4, r"0\.0004, without lr"),
    ],
)
def test_rates_without_sense(tiny_model, tiny_batch, which, arguments, message):
    model = tiny_model()

    def wrong(name):
        return arguments if name.startswith(which) else rates(name)

    with pytest.raises(UsageError, match=message):
        DualRateSVI(model, MeanField(model), wrong, LocalInference(steps=1)).step(tiny_batch())
