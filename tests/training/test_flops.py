"""The counts of `ltm_pyro.training.flops` against the paper's table and torch's own counter of matrix products."""

from importlib import resources

import pytest
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.guides import Amortized, Langevin, Laplace, Masking, MeanField
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Denoiser, GaussianPrior, MaskedDiffusionModel
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.studies.bench.suites import NoModules
from ltm_pyro.training.flops import flops_per_token, flops_per_token_as_published


def counted_per_token(model, guide, batch, inference) -> float:
    """What torch counts in one call of `training_loss` and its backward pass; only plain attention can be counted."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    infer_local(model, guide, batch, inference)  # attention is tried out the first time, which is not to be counted
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss, *_ = training_loss(model, guide, batch, inference)
        loss.backward()
    return counter.get_total_flops() / batch.inputs_BT.numel()


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        {"window": 8, "length": 32},
        {"window": 8, "length": 27},  # the last block is padded
        {"window": 32, "length": 32},
        {"window": 8, "length": 32, "thoughts": 0},
        {"window": 8, "length": 32, "layers": 1},
        {"window": 8, "length": 32, "thought_width": 8, "kv_heads": 2},
        {"window": 8, "length": 32, "thought_layers": [1, 3]},
        {"window": 8, "length": 32, "thought_layers": [3]},
        {"window": 8, "length": 32, "thought_keys": "learned"},
        {"window": 8, "length": 32, "thoughts": 0, "constant_thoughts": 4},
    ],
    ids=str,
)
def test_ours_is_what_torch_counts(tiny_model, tiny_batch, shape, steps, slow_gradient):
    model = tiny_model(**{"vocabulary": 50, "layers": 3, "width": 32, "heads": 4, "thoughts": 4} | shape)
    batch = tiny_batch(size=2, length=shape["length"], vocabulary=50)
    inference = LocalInference(steps=steps, slow_gradient=slow_gradient)
    guide = MeanField(model)
    flops = flops_per_token(model.decoder, guide, shape["length"], inference.from_start())
    assert flops.total == pytest.approx(counted_per_token(model, guide, batch, inference), rel=0.02)


@pytest.mark.parametrize("length", [32, 27])
def test_masked_diffusion_costs_what_torch_counts(tiny_batch, length):
    decoder = Denoiser(50, layers=3, width=32, heads=4, length=32, kv_heads=2)
    model = MaskedDiffusionModel(GaussianPrior(decoder.thought_shape), decoder)
    guide, batch = Masking(model), tiny_batch(size=2, length=length, vocabulary=50)
    flops = flops_per_token(decoder, guide, length, LocalInference())
    assert flops.fast == 0
    assert flops.total == pytest.approx(counted_per_token(model, guide, batch, LocalInference()), rel=0.02)


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
@pytest.mark.parametrize("family", [Amortized, Langevin, Laplace])
def test_a_guide_pays_for_what_it_does_itself(tiny_model, tiny_batch, family, slow_gradient):
    model = tiny_model(vocabulary=50, layers=2, width=32, heads=4, thoughts=2, thought_width=2, window=8, length=32)
    batch, guide = tiny_batch(size=2, length=32, vocabulary=50), family(model)
    inference = LocalInference(steps=3, rate=0.01, slow_gradient=slow_gradient)
    flops = flops_per_token(model.decoder, guide, 32, inference)
    assert flops.total == pytest.approx(counted_per_token(model, guide, batch, inference), rel=0.03)


@pytest.mark.parametrize("steps", [0, 2])
def test_training_without_thoughts_costs_no_cross_attention(tiny_model, tiny_batch, steps):
    model = tiny_model(vocabulary=50, width=32, heads=4, window=8, length=32)
    guide, batch = MeanField(model), tiny_batch(size=2, length=32, vocabulary=50)
    counted = counted_per_token(model, guide, batch, LocalInference(steps=0, use_thoughts=False))
    inference = LocalInference(steps=steps, use_thoughts=False)
    assert flops_per_token(model.decoder, guide, 32, inference).total == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "parameters", "gflops"),
    [("ltm-small", 38e6, 4.07), ("ltm-medium", 51e6, 5.52), ("ltm-large", 76e6, 32.2)],
)
def test_recipes_meet_the_papers_table(recipe, parameters, gflops):
    text = resources.files("ltm_pyro.studies").joinpath("recipes", f"{recipe}.yaml").read_text()
    settings = yaml.safe_load(text)["model"]
    arguments = settings["decoder"]["init_args"]
    decoder = Decoder(settings["vocabulary"], **arguments)
    steps = settings["inference"]["steps"]
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(parameters, rel=0.01)
    assert flops_per_token_as_published(decoder, arguments["length"], steps).total == pytest.approx(
        gflops * 1e9, rel=0.002
    )
