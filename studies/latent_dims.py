"""How many thoughts, and how wide? K per layer and the width of a thought, at equal training FLOPs.

Every coordinate of z costs KL until it is used, and every thought costs keys and values: more room can be worse.
"""

from typing import Any

from optuna.distributions import IntDistribution

space = {"thoughts": IntDistribution(1, 16, log=True), "thought_width": IntDistribution(4, 64, log=True)}
first = {"thoughts": 4, "thought_width": 16}  # the quickstart's


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Both belong to the decoder; prior and guide follow its shape."""
    return {f"model.decoder.init_args.{name}": value for name, value in parameters.items()}
