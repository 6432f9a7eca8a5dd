"""How much faster should thoughts move than the decoder? η_fast / η_slow, with η_slow and the fast schedule.

The paper's ratio is 750 (0.3 to 4e-4, D = 512). Small decoders train at higher slow rates, with a smaller ratio.
"""

from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution

space = {
    "ratio": FloatDistribution(5, 500, log=True),
    "slow_rate": FloatDistribution(1e-3, 2e-2, log=True),
    "schedule": CategoricalDistribution(["cosine", "constant"]),
}
first = {"ratio": 25.0, "slow_rate": 8e-3, "schedule": "cosine"}  # the recipe's


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """The ratio as recipe settings; a curriculum of the fast rate would override it."""
    return {
        "model.inference.rate": parameters["ratio"] * parameters["slow_rate"],
        "model.inference.schedule": parameters["schedule"],
        "model.slow.rate": parameters["slow_rate"],
        "model.curriculum.rate": None,
    }
