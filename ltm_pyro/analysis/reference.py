"""Reference posteriors: Markov chains that are right in the long run, for judging q on a few sequences.

Shapes: C chains, S draws, B = 1 sequence, L layers, K thoughts, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import HMC, MCMC, NUTS
from torch import Tensor

from ltm_pyro.analysis.draws import Described, Sites, describe
from ltm_pyro.contracts import Batch, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import frozen

KERNELS: dict[str, Callable[..., Any]] = {
    "nuts": lambda model: NUTS(model, max_tree_depth=6),
    # one leapfrog step and a Metropolis test: Langevin dynamics, adjusted (Roberts & Tweedie 1996)
    "langevin": lambda model: HMC(model, step_size=0.1, num_steps=1, target_accept_prob=0.57),
}


@dataclass(frozen=True, kw_only=True)
class Chains:
    """How a reference runs.

    Args:
        chains: C, each from a start of its own.
        warmup: steps per chain that find the step size and are thrown away.
        thin: steps per kept draw.
    """

    chains: int = 2
    warmup: int = 200
    thin: int = 1

    def __post_init__(self) -> None:
        if self.chains < 2:
            raise UsageError(f"R-hat compares chains and needs at least 2, got {self.chains}.")


class Reference(NamedTuple):
    """Draws (C, S, 1, …), what the model says of them, and R-hat and effective sample size of every coordinate."""

    sites: Sites
    described: Described
    diagnostics: dict[str, np.ndarray]


def sample(model: Model, batch: Batch, method: str, samples: int, chains: Chains) -> Reference:
    """S draws of each of C chains for one sequence; the decoder stands still."""
    if method not in KERNELS:
        raise UsageError(f"Unknown method {method!r}: choose from guide, {', '.join(KERNELS)}.")
    if batch.size != 1:
        raise UsageError(f"A chain moves all sequences of a batch as one, got {batch.size}: give one at a time.")
    with frozen(model), fix_global_draws(model, torch.initial_seed()):
        found = [_chain(model, batch, method, samples, chains) for _ in range(chains.chains)]
        parts = [describe(model, batch, chain) for chain in found]
    sites = {name: torch.stack([chain[name] for chain in found]) for name in found[0]}
    described = Described._make(torch.stack(x) for x in zip(*parts, strict=True))
    return Reference(sites, described, convergence(described.z_SBLKD))


def _chain(model: Model, batch: Batch, method: str, samples: int, chains: Chains) -> Sites:
    kernel = KERNELS[method](model)
    names = list(prior_sites(model, 1))
    mcmc = MCMC(kernel, samples * chains.thin, chains.warmup, disable_progbar=True)
    mcmc.run(batch)
    drawn = mcmc.get_samples()
    return {name: drawn[name][:: chains.thin].detach() for name in names}


def convergence(z_CSBLKD: Tensor) -> dict[str, np.ndarray]:
    """Rank-normalised split R-hat and bulk effective sample size (Vehtari et al. 2021, arXiv 1903.08008)."""
    from ltm_pyro.analysis.arviz import ess, rhat

    z = z_CSBLKD.cpu().numpy()
    return {"r_hat": rhat(z), "ess": ess(z)}
