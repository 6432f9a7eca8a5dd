"""NUTS as a reference for the full-covariance guide, on a decoder with eight latent dimensions."""

import pytest
import torch
from pyro.infer import MCMC, NUTS

from ltm_pyro.contracts import make_batch
from ltm_pyro.guides import FullCovariance
from ltm_pyro.guides.full_covariance import scale_tril
from ltm_pyro.inference.local import frozen, infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel


@pytest.fixture
def informative():
    """A decoder with 2 x 1 x 4 thoughts whose posterior is clearly different from the prior, and nearly Gaussian."""
    decoder = Decoder(13, layers=2, width=16, heads=2, thoughts=1, window=4, length=48, thought_width=4)
    for block in decoder.blocks:
        block.cross_attention.output.weight.data *= 0.2
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    return model, make_batch(torch.randint(0, 13, (1, 48)), torch.tensor([48]), 0)


@pytest.mark.slow
def test_nuts_agrees_with_the_full_covariance_guide(informative):
    model, batch = informative
    inference = LocalInference(steps=400, rate=0.05, particles=32, noise="antithetic", kl="path")
    state, _ = infer_local(model, FullCovariance(model), batch, inference)
    factor = scale_tril(state.parameters["z_factor"])[0]
    with frozen(model):
        chain = MCMC(NUTS(model, max_tree_depth=4), num_samples=400, warmup_steps=150, disable_progbar=True)
        chain.run(batch)
    z_SN = chain.get_samples()["z"].flatten(1)
    effective_N = chain.diagnostics()["z"]["n_eff"].flatten().clamp(1, 400)

    found_N, true_N = (factor @ factor.mT).diagonal().sqrt(), z_SN.std(0)
    assert z_SN.mean(0).abs().max() > 0.4, "the posterior should differ from the prior"
    # the mean of a Gaussian q is not exactly that of a posterior that is only nearly Gaussian
    allowed_N = 4 * true_N / effective_N.sqrt() + 0.1 * true_N
    assert ((state.parameters["z_loc"][0] - z_SN.mean(0)).abs() < allowed_N).all()
    assert ((found_N / true_N).log().abs() < 0.25).all()
