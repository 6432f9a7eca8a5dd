"""Reference posteriors by Markov chain Monte Carlo, asymptotically exact, to judge q on a few sequences.

Shapes: C chains, S draws, B = 1 sequence, L layers, K thoughts, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import HMC, MCMC, NUTS
from torch import Tensor

from ltm_pyro.analysis.draws import LogDensities, Sites, log_densities
from ltm_pyro.contracts import Batch, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import frozen

KERNELS: dict[str, Callable[..., Any]] = {
    "nuts": lambda model: NUTS(model, max_tree_depth=6),
    # HMC with one leapfrog step is the Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996)
    "langevin": lambda model: HMC(model, step_size=0.1, num_steps=1, target_accept_prob=0.57),
}


@dataclass(frozen=True, kw_only=True)
class ChainOptions:
    """Options of the Markov chains.

    Args:
        chains: C, each with its own random initial point.
        warmup: steps per chain that adapt the step size and are discarded.
        thin: steps per draw that is kept.
    """

    chains: int = 2
    warmup: int = 200
    thin: int = 1

    def __post_init__(self) -> None:
        if self.chains < 2:
            raise UsageError(f"R-hat compares chains and needs at least 2, got {self.chains}.")


class ChainDraws(NamedTuple):
    """Draws (C, S, 1, …), the model's log-densities there, and R-hat and effective sample size per coordinate."""

    sites: Sites
    densities: LogDensities
    diagnostics: dict[str, np.ndarray]


def run_chains(model: Model, batch: Batch, method: str, samples: int, options: ChainOptions) -> ChainDraws:
    """S draws from each of C chains for one sequence; the model's parameters are fixed."""
    if method not in KERNELS:
        raise UsageError(f"Unknown method {method!r}: choose from guide, {', '.join(KERNELS)}.")
    if batch.size != 1:
        raise UsageError(f"A chain moves all sequences of a batch as one, got {batch.size}: give one at a time.")
    chains: list[Sites] = []
    with frozen(model), fix_global_draws(model, torch.initial_seed()):
        for _ in range(options.chains):
            names = list(prior_sites(model, 1))
            mcmc = MCMC(KERNELS[method](model), samples * options.thin, options.warmup, disable_progbar=True)
            mcmc.run(batch)
            drawn = mcmc.get_samples()
            chains.append({name: drawn[name][:: options.thin].detach() for name in names})
        parts = [log_densities(model, batch, sites) for sites in chains]
    sites = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    densities = LogDensities._make(torch.stack(x) for x in zip(*parts, strict=True))
    return ChainDraws(sites, densities, convergence(densities.z_SBLKD))


def convergence(z_CSBLKD: Tensor) -> dict[str, np.ndarray]:
    """Rank-normalised split R-hat and bulk effective sample size (Vehtari et al. 2021, arXiv 1903.08008)."""
    from ltm_pyro.analysis.arviz import ess, rhat

    z = z_CSBLKD.cpu().numpy()
    return {"r_hat": rhat(z), "ess": ess(z)}
