"""Bidirectional Monte Carlo: the evidence of texts that a run generates, from below and from above.

Shapes: S chains, B sequences.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.analysis.calibration import Simulate
from ltm_pyro.contracts import Guide, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.ais import Annealing, annealed_path, forward_ais, reverse_ais
from ltm_pyro.inference.elbo import missing_bound, normalisers
from ltm_pyro.inference.estimators import estimate, fit_problem
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.row_noise import RowNoise
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import clustered_ratio
from ltm_pyro.utils.threads import one_at_a_time


class Sandwich(NamedTuple):
    """−log p(x) of each simulated text in nats: above and below the evidence in expectation, and `iwae` beside them."""

    upper_B: Float[Tensor, " B"]
    lower_B: Float[Tensor, " B"]
    iwae_B: Float[Tensor, " B"]
    tokens_B: Float[Tensor, " B"]

    def as_dict(self) -> dict[str, Any]:
        """Nats per token of all texts together, and the standard errors over texts."""
        gap_B, total = self.upper_B - self.lower_B, self.tokens_B.sum()
        figures = {"ais": self.upper_B, "reverse_ais": self.lower_B, "iwae": self.iwae_B, "gap": gap_B}
        found = {name: clustered_ratio(x_B, self.tokens_B) for name, x_B in figures.items()}
        return {
            "nats_per_token": {name: x.value for name, x in found.items()},
            "stderr": {name: x.stderr if math.isfinite(x.stderr) else None for name, x in found.items()},
            "sequences": len(gap_B),
            "tokens": int(total),
        }


@one_at_a_time
def sandwich(
    model: Model,
    guide: Guide,
    inference: LocalInference,
    simulate: Simulate,
    sequences: int = 16,
    chains: int = 16,
    annealing: Annealing = Annealing(),  # noqa: B008 - immutable
    seed: int = 0,
) -> Sandwich:
    """Annealed importance sampling in both directions, on texts whose thoughts are known because they were simulated.

    The thoughts that generated a text are an exact draw from its posterior, where the reverse chains begin (Grosse,
    Ghahramani & Adams 2015, arXiv 1511.02543). It speaks about texts that the model writes, not about others.

    Args:
        simulate: makes a simulation of a given batch size, such as `ltm_pyro.analysis.calibration.simulate_texts`.
        chains: S, in each direction; `iwae` has as many draws.
    """
    if reason := missing_bound(model, guide) or (normalisers(model) and "the prior's draws are approximate"):
        raise UsageError(f"The evidence cannot be sandwiched: {reason}.")
    with torch.no_grad(), fix_global_draws(model, seed):
        with seeded(seed):
            simulation = simulate(sequences)
        problem = fit_problem(model, guide, simulation.batch, inference, chains, seed, annealing=annealing)
        keys = problem.state.keys
        path = annealed_path(*problem.fitted, annealing, keys)
        forward, reverse = [], []
        for draws in problem.draws("sandwich"):
            size, noise = draws.particles or 1, draws.noise
            forward.append(forward_ais(path, size, noise))
            back = noise and RowNoise(noise.keys.fold_in("reverse"), noise.first)
            reverse.append(reverse_ais(path, simulation.sites, size, back))
        iwae_B = estimate(problem, "iwae").nats_B
    forward_SB, reverse_SB = torch.cat(forward), torch.cat(reverse)
    return Sandwich(
        upper_B=(math.log(chains) - forward_SB.logsumexp(0)).double(),
        lower_B=((-reverse_SB).logsumexp(0) - math.log(chains)).double(),
        iwae_B=iwae_B.double(),
        tokens_B=simulation.batch.tokens_B.double(),
    )
