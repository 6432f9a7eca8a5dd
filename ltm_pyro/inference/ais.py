"""Annealed importance sampling: the evidence of each sequence from chains that move from q to the posterior.

Shapes: S chains, B sequences, K temperatures, N unconstrained coordinates of all latent sites.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Transform

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import sample_sites, sum_log_probs
from ltm_pyro.inference.latent_sites import bijections, prior_sites
from ltm_pyro.inference.local import frozen
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.nn.precision import full_precision

Sites = Mapping[str, tuple[Distribution, Transform]]  # the prior's distribution, and the bijection to its support
WARMUP_CHAINS, WARMUP_PASSES = 4, 3  # of the runs that choose the step sizes
ACCEPTANCE = 0.8  # the acceptance rate that they aim at


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """The path from q to the posterior, and how the chains move along it.

    Args:
        temperatures: K, the number of distributions q^(1−β) p^β after q, with evenly spaced β.
        leapfrog: steps of each Hamiltonian move; there is one move for each temperature below 1.
    """

    temperatures: int = 32
    leapfrog: int = 4

    def __post_init__(self) -> None:
        if self.temperatures < 1 or self.leapfrog < 1:
            raise UsageError(
                f"Annealing needs at least 1 temperature and 1 leapfrog step, got {self.temperatures} and "
                f"{self.leapfrog}."
            )


class Path(NamedTuple):
    """What the chains of a batch need: the densities at both ends, and the step sizes of the moves between them."""

    model: Model
    guide: Guide
    batch: Batch
    local: LocalParameters
    annealing: Annealing
    sites: Sites
    scale_BN: Float[Tensor, "B N"]  # standard deviations of q, so that all coordinates move at one step size
    step_size_KB: Float[Tensor, "K B"]


def annealed_path(
    model: Model, guide: Guide, batch: Batch, local: LocalParameters, annealing: Annealing, keys: RowKeys | None = None
) -> Path:
    """A path whose step sizes are chosen beforehand, by chains of their own: a weight must not depend on its own chain.

    Each sequence has a step size for each temperature.
    """
    size = (annealing.temperatures, batch.size)
    noise = keys and RowNoise(keys.fold_in("ais warm-up"))
    with frozen(model), torch.no_grad():
        sites = bijections(prior_sites(model, 1))
        u_SBN = _unconstrain(sites, _sample_q(sites, guide, batch, local, 64, noise))
        scale_BN = (u_SBN.std(0) if u_SBN.numel() else u_SBN[0]).clamp(min=1e-6)  # without thoughts (K = 0) it is empty
        start = u_SBN.new_full(size, u_SBN.shape[-1] ** -0.25 if u_SBN.shape[-1] else 1.0)
        path = Path(model, guide, batch, local, annealing, sites, scale_BN, start)
        for _ in range(WARMUP_PASSES):
            u_SBN = _unconstrain(sites, _sample_q(sites, guide, batch, local, WARMUP_CHAINS, noise))
            step_size_B, chosen = path.step_size_KB[0], []
            for k in range(annealing.temperatures):
                u_SBN, accepted_SB = _move(path, u_SBN, k, step_size_B, noise)
                step_size_B = step_size_B * (accepted_SB.mean(0) - ACCEPTANCE).exp()
                chosen.append(step_size_B)
            path = path._replace(step_size_KB=(path.step_size_KB * torch.stack(chosen)).sqrt())
    return path


def forward_ais(path: Path, chains: int, noise: RowNoise | None = None) -> Float[Tensor, "S B"]:
    r"""The log-weights of S chains from q to the posterior, in nats; E[exp(weight)] = p(x).

    .. math:: \log w = \sum_{k=1}^K (\beta_k - \beta_{k-1}) \left[\log p(x, z_{k-1}) - \log q(z_{k-1} \mid x)\right],
        \qquad z_0 \sim q, \quad z_k \sim T_{\beta_k}(\cdot \mid z_{k-1})

    T_β is a Hamiltonian move that leaves q^(1−β) p(x, ·)^β invariant (Neal 2001; Neal 2011, arXiv 1206.1901).
    """
    with frozen(path.model), torch.no_grad():
        u_SBN = _unconstrain(path.sites, _sample_q(path.sites, path.guide, path.batch, path.local, chains, noise))
        log_weight_SB = torch.zeros(u_SBN.shape[:2], dtype=u_SBN.dtype, device=u_SBN.device)
        for k in range(path.annealing.temperatures):
            if k:
                u_SBN, _ = _move(path, u_SBN, k, path.step_size_KB[k], noise)
            log_weight_SB = log_weight_SB + _log_densities(path, u_SBN).log_ratio_SB / path.annealing.temperatures
    return log_weight_SB


def reverse_ais(
    path: Path, sites: Mapping[str, Tensor], chains: int, noise: RowNoise | None = None
) -> Float[Tensor, "S B"]:
    """The log-weights of S chains backwards, from an exact draw of the posterior to q; E[exp(−weight)] = 1 / p(x).

    With data that the model has generated, the thoughts that generated them are such a draw (bidirectional Monte Carlo:
    Grosse, Ghahramani & Adams 2015, arXiv 1511.02543).

    Args:
        sites: the values of the latent sites that generated each sequence, (B, *event).
    """
    with frozen(path.model), torch.no_grad():
        u_SBN = _unconstrain(path.sites, {name: x.expand(chains, *x.shape) for name, x in sites.items()})
        log_weight_SB = torch.zeros(u_SBN.shape[:2], dtype=u_SBN.dtype, device=u_SBN.device)
        for k in reversed(range(path.annealing.temperatures)):
            log_weight_SB = log_weight_SB + _log_densities(path, u_SBN).log_ratio_SB / path.annealing.temperatures
            if k:
                u_SBN, _ = _move(path, u_SBN, k, path.step_size_KB[k], noise)
    return log_weight_SB


class _LogDensities(NamedTuple):
    log_q_SB: Float[Tensor, "S B"]  # of the unconstrained coordinates
    log_ratio_SB: Float[Tensor, "S B"]  # log p(x, z) − log q(z | x)


def _log_densities(path: Path, u_SBN: Float[Tensor, "S B N"]) -> _LogDensities:
    """log q(u | x), and log p(x, z(u)) − log q(z(u) | x), in which the Jacobian of z(u) cancels."""
    model, batch = path.model, path.batch
    values, log_jacobian_SB = _constrain(path.sites, u_SBN)
    particles = pyro.plate(PARTICLES, len(u_SBN), dim=-2)
    with no_param_store(model), particles:
        with full_precision(batch.inputs_BT):
            q = poutine.trace(poutine.condition(path.guide, data=values)).get_trace(batch, path.local)
            log_q_SB = sum_log_probs(q, values)
        p = poutine.trace(poutine.condition(model, data=values)).get_trace(batch)
    log_joint_SB = sum_log_probs(p, sample_sites(p))
    return _LogDensities(log_q_SB + log_jacobian_SB, log_joint_SB - log_q_SB)


def _move(
    path: Path, u_SBN: Tensor, k: int, step_size_B: Float[Tensor, " B"], noise: RowNoise | None
) -> tuple[Float[Tensor, "S B N"], Float[Tensor, "S B"]]:
    """One Hamiltonian move of every chain at temperature k, and its acceptance probability.

    The step size varies by a fifth from move to move, so that no trajectory returns to where it began.
    """
    beta, lead = k / path.annealing.temperatures, u_SBN.shape[:2]
    with nullcontext() if noise is None else noise.mode(lead):
        momentum_SBN = torch.randn(u_SBN.shape, dtype=u_SBN.dtype, device=u_SBN.device)
        jitter_2SB = torch.rand(*lead, 2, dtype=u_SBN.dtype, device=u_SBN.device).movedim(-1, 0)
    step_SBN = (step_size_B * (0.8 + 0.4 * jitter_2SB[0]))[..., None] * path.scale_BN

    def value_and_gradient(u_SBN: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u_SBN = u_SBN.detach().requires_grad_()
            log_q_SB, log_ratio_SB = _log_densities(path, u_SBN)
            value_SB = log_q_SB + beta * log_ratio_SB
            return value_SB.detach(), torch.autograd.grad(value_SB.sum(), u_SBN)[0]

    start_SB, gradient_SBN = value_and_gradient(u_SBN)
    energy_SB = start_SB - momentum_SBN.square().sum(-1) / 2
    proposed_SBN = u_SBN
    for _ in range(path.annealing.leapfrog):
        momentum_SBN = momentum_SBN + step_SBN * gradient_SBN / 2
        proposed_SBN = proposed_SBN + step_SBN * momentum_SBN
        end_SB, gradient_SBN = value_and_gradient(proposed_SBN)
        momentum_SBN = momentum_SBN + step_SBN * gradient_SBN / 2
    log_accept_SB = (end_SB - momentum_SBN.square().sum(-1) / 2 - energy_SB).nan_to_num(-torch.inf, 0.0, -torch.inf)
    accept_SB = log_accept_SB.clamp(max=0).exp()
    return torch.where((jitter_2SB[1] < accept_SB)[..., None], proposed_SBN, u_SBN), accept_SB


def _sample_q(
    sites: Sites, guide: Guide, batch: Batch, local: LocalParameters, samples: int, noise: RowNoise | None
) -> dict[str, Tensor]:
    """S draws of every latent site from q."""
    particles = pyro.plate(PARTICLES, samples, dim=-2)
    with no_param_store(), full_precision(batch.inputs_BT), noise or nullcontext(), particles:
        q = poutine.trace(guide).get_trace(batch, local)
    return {name: cast(Tensor, q.nodes[name]["value"]) for name in sites}


def _unconstrain(sites: Sites, values: Mapping[str, Tensor]) -> Float[Tensor, "S B N"]:
    """All latent sites of every sequence as one vector of unconstrained coordinates."""
    parts = [bijection.inv(values[name]) for name, (_, bijection) in sites.items()]
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=-1)


def _constrain(sites: Sites, u_SBN: Float[Tensor, "S B N"]) -> tuple[dict[str, Tensor], Float[Tensor, "S B"]]:
    """The latent sites at unconstrained coordinates, and log |det ∂z/∂u|."""
    values, log_jacobian_SB, first = {}, u_SBN.new_zeros(u_SBN.shape[:2]), 0
    for name, (fn, bijection) in sites.items():
        shape = torch.Size(bijection.inverse_shape(fn.event_shape))
        part = u_SBN[..., first : first + shape.numel()].unflatten(-1, shape or (1,))
        part = part if shape else part[..., 0]
        values[name], first = bijection(part), first + shape.numel()
        log_det = bijection.log_abs_det_jacobian(part, values[name])
        log_jacobian_SB = log_jacobian_SB + log_det.reshape(*log_det.shape[:2], -1).sum(-1)
    return values, log_jacobian_SB
