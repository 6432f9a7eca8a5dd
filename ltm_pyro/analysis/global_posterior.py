"""Global latent variables of a run, such as the scales of a hierarchical prior: their posterior, and its shrinkage.

Shapes: S draws, N components of a variable.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch.distributions import biject_to

from ltm_pyro.contracts import Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import GlobalLatent
from ltm_pyro.utils.rng import seeded

DRAWS = 1000


class GlobalPosterior(NamedTuple):
    """Draws from q(g) and p(g) of one variable, flattened to N components, and the KL in nats per corpus.

    ``shrinkage`` is 1 − sd_q / sd_p of each component in unconstrained coordinates, where heavy tails have a scale (the
    sd is that of the middle 68 % of draws): 0 where the corpus says nothing, 1 where it says all.
    """

    name: str
    posterior_SN: Float[np.ndarray, "S N"]
    prior_SN: Float[np.ndarray, "S N"]
    shrinkage_N: Float[np.ndarray, " N"]
    kl: float

    @property
    def interval_3N(self) -> Float[np.ndarray, "3 N"]:
        """The 5 %, 50 % and 95 % quantiles of q."""
        return np.quantile(self.posterior_SN, [0.05, 0.5, 0.95], axis=0)


def global_posteriors(model: Model, draws: int = DRAWS, seed: int = 0) -> list[GlobalPosterior]:
    """The global latent variables of a model; `UsageError` if it has none.

    Texts generated from `model.sample_prior` draw them anew from q(g), which is the predictive distribution.
    """
    latents = [part for part in model.modules() if isinstance(part, GlobalLatent)]
    if not latents:
        raise UsageError("The prior has no global latent variables: SparsePrior has, or an ltm_pyro.GlobalLatent.")
    found = []
    with torch.no_grad(), seeded(seed):
        for latent in latents:
            q = torch.stack([latent.draw() for _ in range(draws)]).flatten(1)
            p = latent.prior().expand(latent.loc.shape).sample((draws,)).flatten(1)
            to_support = biject_to(latent.prior().support)
            spreads = [_spread(to_support.inv(x).double().cpu().numpy()) for x in (q, p)]
            found.append(
                GlobalPosterior(
                    name=latent.name,
                    posterior_SN=q.double().cpu().numpy(),
                    prior_SN=p.double().cpu().numpy(),
                    shrinkage_N=1 - spreads[0] / spreads[1],
                    kl=float(latent.kl()),
                )
            )
    return found


def _spread(x_SN: np.ndarray) -> np.ndarray:
    """Half the width of the middle 68 % of draws, which is the sd of a normal distribution."""
    low, high = np.quantile(x_SN, [0.1587, 0.8413], axis=0)
    return (high - low) / 2
