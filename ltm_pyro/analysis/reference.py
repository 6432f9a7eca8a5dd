"""Reference posteriors by Markov chain Monte Carlo, asymptotically exact, to judge q on a few sequences.

Shapes: C chains, S draws, B = 1 sequence, L layers, K thoughts, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

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


class _Recorded(HMC):
    """Pyro's kernel, which also keeps what a step was like: energy, acceptance probability, tree depth, divergence."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.steps: list[dict[str, float]] = []  # after warm-up, by ArviZ's names
        self.accepted = 0.0  # the sum of acceptance probabilities, because Pyro keeps their running mean
        self._kinetic, self._depth = math.nan, 0
        super().__init__(*args, **options)

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        self._kinetic, self._depth = math.nan, 0
        potential = self._fetch_from_cache()[1]
        drawn: dict[str, Tensor] = super().sample(params)
        number = self._t - cast(int, self._warmup_steps)  # Pyro has counted this step
        if number > 0:
            total, before = number * float(self._mean_accept_prob), self.accepted
            self.accepted = total
            potential = self._fetch_from_cache()[1] if potential is None else potential
            self.steps.append(
                {
                    "energy": float(potential) + self._kinetic,
                    "acceptance_rate": total - before,
                    "tree_depth": self._depth,
                    "diverging": bool(self._divergences and self._divergences[-1] == number - 1),
                }
            )
        return drawn

    def _kinetic_energy(self, r_unscaled: dict[Any, Tensor]) -> Tensor:
        energy: Tensor = super()._kinetic_energy(r_unscaled)
        if math.isnan(self._kinetic):  # that of the momentum which the step begins with
            self._kinetic = float(energy)
        return energy


class _RecordedNUTS(_Recorded, NUTS):
    def _build_tree(self, z: Any, r: Any, grads: Any, log_slice: Any, direction: Any, depth: int, energy: Any) -> Any:
        self._depth = max(self._depth, depth + 1)
        return super()._build_tree(z, r, grads, log_slice, direction, depth, energy)


class Kernel(NamedTuple):
    """A Markov kernel: what it is, as a posterior's file says, and how it is made for a model."""

    name: str
    make: Callable[..., Any]


KERNELS = {
    "nuts": Kernel("NUTS of Pyro, max_tree_depth 6", lambda model: _RecordedNUTS(model, max_tree_depth=6)),
    # HMC with one leapfrog step is the Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996)
    "langevin": Kernel(
        "HMC of Pyro with one step (Metropolis-adjusted Langevin)",
        lambda model: _Recorded(model, step_size=0.1, num_steps=1, target_accept_prob=0.57),
    ),
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
    """Draws (C, S, 1, …), the model's log-densities there, and how the chains went.

    ``diagnostics`` has R-hat and effective sample sizes of every coordinate, ``steps`` ArviZ's ``sample_stats`` of
    every draw (C, S): ``energy``, ``acceptance_rate``, ``tree_depth`` and ``diverging`` (of any step since the last
    draw that was kept).
    """

    sites: Sites
    densities: LogDensities
    diagnostics: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]


def run_chains(model: Model, batch: Batch, method: str, samples: int, options: ChainOptions) -> ChainDraws:
    """S draws from each of C chains for one sequence; the model's parameters are fixed."""
    if method not in KERNELS:
        raise UsageError(f"Unknown method {method!r}: choose from guide, {', '.join(KERNELS)}.")
    if batch.size != 1:
        raise UsageError(f"A chain moves all sequences of a batch as one, got {batch.size}: give one at a time.")
    chains: list[Sites] = []
    steps: list[dict[str, np.ndarray]] = []
    with frozen(model), fix_global_draws(model, torch.initial_seed()):
        for _ in range(options.chains):
            names = list(prior_sites(model, 1))
            kernel = KERNELS[method].make(model)
            mcmc = MCMC(kernel, samples * options.thin, options.warmup, disable_progbar=True)
            mcmc.run(batch)
            drawn = mcmc.get_samples()
            chains.append({name: drawn[name][:: options.thin].detach() for name in names})
            taken = {name: np.array([step[name] for step in kernel.steps]) for name in kernel.steps[0]}
            kept: dict[str, Any] = {name: x[:: options.thin] for name, x in taken.items()}
            steps.append(kept | {"diverging": taken["diverging"].reshape(samples, options.thin).any(1)})
        parts = [log_densities(model, batch, sites) for sites in chains]
    sites = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    densities = LogDensities._make(torch.stack(x) for x in zip(*parts, strict=True))
    taken = {name: np.stack([chain[name] for chain in steps]) for name in steps[0]}
    return ChainDraws(sites, densities, convergence(densities.z_SBLKD), taken)


def convergence(z_CSBLKD: Tensor) -> dict[str, np.ndarray]:
    """Rank-normalised split R-hat, bulk and tail effective sample size (Vehtari et al. 2021, arXiv 1903.08008)."""
    from ltm_pyro.analysis.arviz import ess, rhat

    z = z_CSBLKD.cpu().numpy()
    return {"r_hat": rhat(z), "ess": ess(z), "ess_tail": ess(z, "tail")}
