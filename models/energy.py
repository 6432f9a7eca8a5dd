"""An energy-based prior: its density is known only up to a constant."""

import math
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.errors import UsageError
from ltm_pyro.models.density import ThoughtDensity
from ltm_pyro.nn.precision import full_precision


class EnergyPrior(PyroModule):
    r"""The standard normal, multiplied by the exponential of a small network (exponential tilting).

    .. math:: p(z) = \frac{1}{C} e^{f(z)}\, \mathcal{N}(z; 0, I), \qquad
        \nabla \log p(z) = \nabla f(z) - E_{p}[\nabla f]

    C has no closed form. Samples come from short-run Langevin dynamics, started at the standard normal; the slow step
    uses them to estimate the expectation in the gradient (contrastive learning). f starts at 0. While C is unknown,
    log p(z) is too large by log C and no bound is reported. `estimate_normaliser` estimates log C; the resulting figure
    is reported, but not as a bound. Source: Pang et al. 2020 (arXiv 2006.08205), the energy-based prior with short-run
    sampling.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        width: hidden units of the network, which has two hidden layers.
        steps: Langevin steps per sample.
        step_size: of each step; the standard deviation of its noise is √(2 · ``step_size``).
        contrast: samples per estimate of E_p[∇f].
    """

    log_normaliser: Tensor

    def __init__(
        self, shape: ThoughtShape, width: int = 64, steps: int = 20, step_size: float = 0.1, contrast: int = 64
    ) -> None:
        super().__init__()
        if min(width, steps, contrast) < 1 or not step_size > 0:
            raise UsageError(
                f"EnergyPrior needs width, steps and contrast of at least 1 and a step_size above 0, "
                f"got {width}, {steps}, {contrast} and {step_size}."
            )
        self.shape, self.steps, self.step_size, self.contrast = shape, steps, step_size, contrast
        features = math.prod(shape)
        self.tilt = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        )
        last: Any = self.tilt[-1]
        nn.init.zeros_(last.weight)
        self.register_buffer("log_normaliser", torch.tensor(torch.nan), persistent=False)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, ThoughtDensity(self))

    def log_density(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """f(z) + log N(z; 0, I) − log C, in nats.

        log C is 0 until it is estimated. Its gradient is E_p[∇f], estimated from ``contrast`` samples.
        """
        constant = self.log_normaliser.nan_to_num(0.0)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.tilt.parameters()):
            mean = self._energy(self.sample(torch.Size([self.contrast]))).mean()
            constant = constant + mean - mean.detach()
        normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
        return self._energy(z_BLKD) + normal.log_prob(z_BLKD).flatten(-3).sum(-1) - constant

    def sample(self, sample_shape: torch.Size) -> Float[Tensor, "*S L K D"]:
        """Short-run Langevin dynamics from N(0, I)."""
        z_SLKD = torch.randn(
            *sample_shape, *self.shape, dtype=self.log_normaliser.dtype, device=self.log_normaliser.device
        )
        for _ in range(self.steps):
            with torch.enable_grad(), full_precision(z_SLKD):
                z_SLKD = z_SLKD.detach().requires_grad_()
                (gradient_SLKD,) = torch.autograd.grad(self._energy(z_SLKD).sum(), z_SLKD)
            noise_SLKD = math.sqrt(2 * self.step_size) * torch.randn_like(z_SLKD)
            z_SLKD = z_SLKD + self.step_size * (gradient_SLKD - z_SLKD) + noise_SLKD
        return z_SLKD.detach()

    def estimate_normaliser(self, samples: int) -> tuple[float, float]:
        r"""log C = log E_N(0,I)[e^f] from ``samples`` draws, and its standard error; `log_density` then uses log C."""
        with torch.no_grad():
            like = self.log_normaliser
            f_S = self._energy(torch.randn(samples, *self.shape, dtype=like.dtype, device=like.device)).double()
        self.log_normaliser.fill_(f_S.logsumexp(0) - math.log(samples))
        weight_S = (f_S - f_S.max()).exp()
        return self.log_normaliser.item(), (weight_S.std() / weight_S.mean() / math.sqrt(samples)).item()

    def _energy(self, z_BLKD: Tensor) -> Tensor:
        return self.tilt(z_BLKD.flatten(-3))[..., 0]
