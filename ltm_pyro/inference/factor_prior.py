"""A prior with `pyro.factor`, which is a density only after division by a constant, and an estimate of the constant."""

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from ltm_pyro.contracts import sequence_plate
from ltm_pyro.inference.latent_sites import factors_of
from ltm_pyro.inference.param_store import no_param_store


class FactorPrior(PyroModule):
    r"""The prior of a program with factors, divided by its constant.

    .. math:: p(z) = \frac{1}{C} e^{f(z)}\, p_0(z), \qquad C = E_{p_0}[e^{f(z)}]

    p₀ is the program without its factors. While C is not estimated, log p(z) is too large by log C. The constant does
    not depend on what is learned (`check_prior`).

    Args:
        prior: the program.
    """

    log_normaliser: Tensor

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("log_normaliser", torch.tensor(torch.nan), persistent=False)

    def forward(self, **labels: Tensor) -> Tensor:
        """Samples the sites of the program, and subtracts log C from its log-density."""
        z_BLKD: Tensor = self.prior(**labels)
        pyro.factor("log_normaliser", -self.log_normaliser.nan_to_num(0.0))
        return z_BLKD

    def estimate_normaliser(self, samples: int) -> tuple[float, float]:
        r"""log C = log E_{p₀}[e^f] from ``samples`` draws, and its standard error; afterwards p(z) is divided by C."""
        with torch.no_grad(), no_param_store(), poutine.trace() as drawn, sequence_plate(samples):
            self.prior()
        f_S = torch.stack([x.expand(samples) for x in factors_of(drawn.trace).values()]).sum(0).double()
        self.log_normaliser.fill_(f_S.logsumexp(0) - math.log(samples))
        weight_S = (f_S - f_S.max()).exp()
        return self.log_normaliser.item(), (weight_S.std() / weight_S.mean() / math.sqrt(samples)).item()
