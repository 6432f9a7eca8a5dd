"""How many thoughts, how wide, and attended to by which layers? K per layer and the width of a thought, at equal FLOPs.

Every coordinate of z costs KL until it is used, and every thought costs keys and values: more of them can be worse. The
layers below the first one with thoughts are computed once per batch, so thoughts for the second layer only are cheaper.
"""

from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

LAYERS = {"all": None, "1": [1], "2": [2]}  # the recipe has two

space = {
    "thoughts": IntDistribution(1, 16, log=True),
    "thought_width": IntDistribution(4, 64, log=True),
    "thought_layers": CategoricalDistribution(list(LAYERS)),
}
first = {"thoughts": 4, "thought_width": 16, "thought_layers": "all"}  # the recipe's


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """All three belong to the decoder; prior and guide follow its shape."""
    chosen = parameters | {"thought_layers": LAYERS[parameters["thought_layers"]]}
    return {f"model.decoder.init_args.{name}": value for name, value in chosen.items()}
