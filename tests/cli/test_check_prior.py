"""`ltm check-prior`: a prior is drawn from before training, and what it says to the decoder stands beside N(0, I)."""

import json

import pytest
import torch
import yaml

from ltm_pyro.analysis.prior_predictive import prior_predictive
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference

SCALED = """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

class Scaled(PyroModule):
    def __init__(self, shape, scale: float = 1.0):
        super().__init__()
        self.shape, self.scale = shape, scale

    def forward(self):
        return pyro.sample("z", dist.Normal(torch.zeros(*self.shape), self.scale).to_event(3))
"""


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """The file of a prior whose scale is an option."""
    path = tmp_path_factory.mktemp("own") / "scaled.py"
    path.write_text(SCALED)
    return path


@pytest.fixture
def check(recipe, scaled, ltm):
    """Checks a prior of the given scale; what the command says, as JSON and as text."""

    def checked(scale, *options):
        place = ("--option", f"model.prior={scaled}:Scaled", "--option", f"model.prior.scale={scale}")
        code, out, err = ltm("check-prior", recipe, *place, *options, "--json")
        assert code == 0, err
        return json.loads(out), ltm("check-prior", recipe, *place, *options)[1]

    return checked


@pytest.mark.parametrize(
    ("scale", "said"), [(1.0, "Nothing stands out"), (0.01, "less than a tenth"), (100.0, "more than ten times")]
)
def test_an_effect_that_is_far_too_small_or_large_is_reported(check, scale, said):
    found, text = check(scale, "--texts", 1)
    assert [said in sentence for sentence in found["verdicts"]] == [True]
    assert said in text
    (site,) = found["sites"]
    assert (site["site"], site["family"], site["shape"]) == ("z", "Normal", [2, 2, 16])
    assert site["sd"] == pytest.approx(scale, rel=0.05)
    assert site["quantiles"][3] == pytest.approx(1.96 * scale, rel=0.1)
    assert set(found["effect"]["added"]) == {"1", "2"}
    assert found["kl"] == pytest.approx(0, abs=1e-4)  # q starts at the prior
    assert len(found["texts"]) == 1


def test_a_run_is_checked_and_a_picture_drawn(run, ltm, refused, tmp_path):
    words = ("check-prior", run, "--samples", 4, "--sequences", 2, "--picture", tmp_path / "prior.png")
    code, out, err = ltm(*words, "--seed", 3, "--json")
    assert code == 0, err
    assert json.loads(ltm(*words, "--seed", 3, "--json", "--force")[1]) == json.loads(out)
    assert (tmp_path / "prior.png").read_bytes().startswith(b"\x89PNG")
    assert "exists already" in refused(*words)
    (tmp_path / "text.txt").write_text("time and again")
    code, other, err = ltm("check-prior", run, "--data", tmp_path / "text.txt", "--json")
    assert code == 0, err
    assert json.loads(other)["tokens"] < json.loads(out)["tokens"]
    assert "would have no effect on a run" in refused("check-prior", run, "--option", "model.slow.rate=1")


def test_without_thoughts_there_is_no_prior_to_check(recipe, refused, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["decoder"]["init_args"]["thoughts"] = 0
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(settings))
    assert "no thoughts (K = 0)" in refused("check-prior", tmp_path / "none.yaml")
    assert "--option model.prior=mine.py:NAME" in refused("check-prior", "mine.py")
    for seed in (-3, 9**30):
        assert "choose a seed from 0" in refused("check-prior", recipe, "--option", f"seed_everything={seed}")


def test_information_is_zero_for_a_decoder_that_ignores_thoughts(tiny_model, tiny_batch):
    model = tiny_model()
    batch = tiny_batch()
    effect = prior_predictive(model, MeanField(model), batch, LocalInference(), draws=8).effect
    assert effect.information > 1e-4
    for block in model.decoder.layer_list:
        torch.nn.init.zeros_(block.cross_attention.output.weight)
    found = prior_predictive(model, MeanField(model), batch, LocalInference(), draws=8)
    assert found.effect.information == pytest.approx(0, abs=1e-12)
    assert set(found.effect.added.values()) == {0.0}
    assert "zero_init_cross_attention" in found.verdicts()[0]


def test_padding_changes_nothing_and_draws_that_are_not_finite_are_reported(tiny_model, tiny_batch):
    model = tiny_model()
    batch = tiny_batch(size=1)
    guide, padded = MeanField(model), tiny_batch(size=1, length=12)
    padded = padded._replace(mask_BT=torch.arange(12)[None] < 7)
    padded.inputs_BT[:, :7], padded.targets_BT[:, :7] = batch.inputs_BT, batch.targets_BT
    one, other = (prior_predictive(model, guide, x, LocalInference(), draws=4).effect for x in (batch, padded))
    assert one.added == pytest.approx(other.added)
    assert one.information == pytest.approx(other.information)
    with torch.no_grad():
        model.decoder.layer_list[0].cross_attention.output.weight.fill_(torch.nan)
    found = prior_predictive(model, guide, batch, LocalInference(), draws=4)
    assert found.verdicts() == ["Some draws are not finite: bound the prior's parameters, or choose lighter tails."]
