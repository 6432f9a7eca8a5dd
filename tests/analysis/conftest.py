"""The linear-Gaussian model, the exact posterior as a guide, and guides that differ from it in known ways."""

import pytest
import torch

from ltm_pyro.analysis.calibration import Simulation
from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.guides import FullCovariance
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

STILL = LocalInference(steps=0)  # no fit, because these guides compute the answer


class Exact(FullCovariance):
    """The exact posterior, scales times ``scale``, shifted by ``shift`` sd; ``diagonal`` is the best mean-field one."""

    def __init__(self, model, scale=1.0, diagonal=False, shift=0.0):
        super().__init__(model)
        self.model, self.scale, self.diagonal, self.shift = model, scale, diagonal, shift

    def __call__(self, batch, local):
        truth = (self.model.factorised if self.diagonal else self.model.posterior)(batch)
        scale_BNN = torch.linalg.cholesky(truth.covariance_BNN) * self.scale
        factor_BNN = scale_BNN.tril(-1) + torch.diag_embed(scale_BNN.diagonal(dim1=-2, dim2=-1).log())
        sd_BN = truth.covariance_BNN.diagonal(dim1=-2, dim2=-1).sqrt()
        self.found = {"z_loc": truth.mean_BN + self.shift * sd_BN, "z_factor": factor_BNN}
        return super().__call__(batch, self.found)

    def posterior(self, name, local):
        return super().posterior(name, self.found)


@pytest.fixture
def known():
    return LinearGaussianModel(ThoughtShape(2, 1, 3))


@pytest.fixture
def exact():
    """Makes a guide that is the exact posterior up to its scale and correlations."""
    return Exact


@pytest.fixture
def simulate():
    """Makes the simulator of a linear-Gaussian model: z from the prior, and observations given z."""

    def make(model):
        def simulate(size):
            z_BLKD = model.sample_prior(size)
            return Simulation({"z": z_BLKD}, model.sample_tokens(z_BLKD))

        return simulate

    return make


@pytest.fixture
def posterior():
    """Makes a `Posterior` of a model's batch under a guide."""

    def make(model, guide, batch, samples=400, inference=STILL):
        return draw_batch_posterior(model, guide, batch, inference, DrawOptions(samples=samples))

    return make
