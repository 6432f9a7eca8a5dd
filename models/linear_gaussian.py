"""Models with a known answer: linear-Gaussian observations of the thoughts, with one mode and with two.

Shapes: B sequences, T observations, N = L·K·D latent coordinates, V values an observation can have.
"""

import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor

from ltm_pyro.contracts import TOKENS, Batch, ThoughtShape, make_batch, sequence_plate
from ltm_pyro.models.gaussian import GaussianPrior


class Gaussian(NamedTuple):
    """N(mean, covariance) of each sequence's N latent coordinates."""

    mean_BN: Float[Tensor, "B N"]
    covariance_BNN: Float[Tensor, "B N N"]


class LinearGaussianModel(PyroModule):
    r"""Thoughts observed through a matrix, with noise; posterior and evidence are known in closed form.

    .. math:: p(z) = \mathcal{N}(0, I), \qquad p(y \mid z) = \prod_t \mathcal{N}(y_t; (A z)_t, s^2)

    It can replace a `LatentThoughtModel` anywhere: same plate, sites and shapes. Token v is the observation
    ``values_V[v]``, on an evenly spaced grid; its log-density is in nats.

    Args:
        shape: (L, K, D) of the thoughts.
        length: T, rows of A.
        noise: s.
        vocabulary: V, grid points between −8 and 8.
        seed: random seed of A, whose entries are N(0, 1/N).
    """

    matrix_TN: Tensor
    values_V: Tensor

    def __init__(
        self, shape: ThoughtShape, length: int = 6, noise: float = 0.5, vocabulary: int = 4001, seed: int = 0
    ) -> None:
        super().__init__()
        self.prior, self.noise, self.length = GaussianPrior(shape), noise, length
        coordinates = math.prod(shape)
        generator = torch.Generator().manual_seed(seed)
        matrix_TN = torch.randn(length, coordinates, generator=generator, dtype=torch.float64) / coordinates**0.5
        self.register_buffer("matrix_TN", matrix_TN.to(torch.get_default_dtype()))
        self.register_buffer("values_V", torch.linspace(-8, 8, vocabulary))

    def sample_prior(self, size: int) -> Float[Tensor, "... L K D"]:
        """Samples the thoughts of ``size`` sequences."""
        with sequence_plate(size):
            return self.prior()

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is: everything depends on z. Raises `UsageError` for tokens beyond the vocabulary."""
        batch.check_tokens(len(self.values_V))
        return batch

    def forward(self, batch: Batch) -> Float[Tensor, "... L K D"]:
        """Samples z, observes the values, and returns z."""
        with sequence_plate(batch.size):
            z_BLKD = self.prior()
            pyro.sample(TOKENS, self.observation(z_BLKD, batch), obs=self.observed(batch))
        return z_BLKD

    def observation(self, z_BLKD: Float[Tensor, "... L K D"], batch: Batch) -> Any:
        """p(y | z) as a distribution; padding is masked out."""
        mean_BT = z_BLKD.flatten(-3) @ self.matrix_TN[: batch.inputs_BT.shape[1]].T
        return dist.Normal(mean_BT, self.noise).mask(batch.mask_BT).to_event(1)

    def observed(self, batch: Batch) -> Float[Tensor, "B T"]:
        """y, the values of the tokens."""
        return self.values_V[batch.targets_BT]

    def sample_batch(self, size: int) -> Batch:
        """``size`` sequences of observations: z sampled from the prior, y from p(y | z)."""
        with torch.no_grad():
            return self.sample_tokens(self.sample_prior(size))

    def sample_tokens(self, z_BLKD: Float[Tensor, "B L K D"]) -> Batch:
        """A batch with one sequence per z, sampled from p(y | z); each y becomes the nearest grid value's token."""
        mean_BT = z_BLKD.flatten(-3) @ self.matrix_TN.T
        y_BT = mean_BT + self.noise * torch.randn_like(mean_BT)
        tokens_BT = torch.bucketize(y_BT, (self.values_V[1:] + self.values_V[:-1]) / 2)
        return make_batch(tokens_BT, torch.full((len(z_BLKD),), self.length), start_token=0)

    def posterior(self, batch: Batch) -> Gaussian:
        """The exact p(z | y): precision I + Aᵀ A / s², mean covariance · Aᵀ y / s²."""
        matrix_BTN = self.matrix_TN[: batch.inputs_BT.shape[1]] * batch.mask_BT[..., None]
        identity_NN = torch.eye(matrix_BTN.shape[-1], dtype=matrix_BTN.dtype, device=matrix_BTN.device)
        precision_BNN = identity_NN + matrix_BTN.mT @ matrix_BTN / self.noise**2
        covariance_BNN = torch.linalg.inv(precision_BNN)
        shift_BN1 = matrix_BTN.mT @ self.observed(batch)[..., None] / self.noise**2
        return Gaussian((covariance_BNN @ shift_BN1)[..., 0], covariance_BNN)

    def factorised(self, batch: Batch, block: int = 1) -> Gaussian:
        """The best Gaussian that factorises over blocks of ``block`` neighbouring coordinates; mean-field if it is 1.

        "Best" is the smallest KL(q ‖ p(z | y)): the mean is exact, and the covariance of each block is the inverse of
        that block of the exact precision.
        """
        mean_BN, covariance_BNN = self.posterior(batch)
        precision_BNN = torch.linalg.inv(covariance_BNN)
        block_N = torch.arange(mean_BN.shape[-1], device=mean_BN.device) // block
        same_block_NN = block_N[:, None] == block_N
        return Gaussian(mean_BN, torch.linalg.inv(precision_BNN * same_block_NN))

    def log_evidence(self, batch: Batch) -> Float[Tensor, " B"]:
        """log p(y) = log p(y | z) + log p(z) − log p(z | y), in nats: true at any z, computed at the posterior mean."""
        mean_BN, covariance_BNN = self.posterior(batch)
        z_BLKD = mean_BN.unflatten(-1, tuple(self.prior.shape))
        likelihood_B = LinearGaussianModel.observation(self, z_BLKD, batch).log_prob(self.observed(batch))
        prior_B = dist.Normal(0.0, 1.0).log_prob(mean_BN).sum(-1)
        return likelihood_B + prior_B - dist.MultivariateNormal(mean_BN, covariance_BNN).log_prob(mean_BN)


class TwoModesModel(LinearGaussianModel):
    r"""A linear-Gaussian model that does not know the sign of its thoughts: z and −z are equally good.

    .. math:: p(y \mid z) = \tfrac12 \mathcal{N}(y; A z, s^2) + \tfrac12 \mathcal{N}(y; -A z, s^2)

    The evidence is that of `LinearGaussianModel`. The posterior is an equal mixture of `posterior` and its mirror image
    −z. A Gaussian q covers one mode only; if the modes are far apart, its ELBO is about log 2 nats below the evidence.
    """

    def observation(self, z_BLKD: Float[Tensor, "... L K D"], batch: Batch) -> Any:
        """p(y | z) as a distribution, with the sign summed out."""
        mean_BT = z_BLKD.flatten(-3) @ self.matrix_TN[: batch.inputs_BT.shape[1]].T
        both = dist.Normal(torch.stack([mean_BT, -mean_BT], dim=-2), self.noise)
        signs = dist.Categorical(logits=torch.zeros(*mean_BT.shape[:-1], 2))
        return dist.MixtureSameFamily(signs, both.mask(batch.mask_BT[:, None]).to_event(1))
