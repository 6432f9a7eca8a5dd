"""Which prior, met by which guide? Four priors times three Gaussian guides, at equal training FLOPs."""

from itertools import product
from typing import Any

from optuna.distributions import CategoricalDistribution

PRIORS = ("GaussianPrior", "LearnedGaussianPrior", "MixturePrior", "HierarchicalPrior")
GUIDES = ("MeanField", "LowRank", "FullCovariance")

space = {"prior": CategoricalDistribution(PRIORS), "guide": CategoricalDistribution(GUIDES)}
points = tuple({"prior": prior, "guide": guide} for prior, guide in product(PRIORS, GUIDES))


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Priors and guides by dotted path."""
    return {
        "model.prior": f"ltm_pyro.models.{parameters['prior']}",
        "model.guide": f"ltm_pyro.guides.{parameters['guide']}",
    }
