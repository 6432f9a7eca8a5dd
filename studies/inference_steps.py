"""What do fast steps buy, in training and at test time, beside a larger model at equal training FLOPs?

The paper trades "reasoning steps for size". Here T_fast in training goes from 1 to 16 and the width over a factor of 3;
every trained model is scored after 0 to 64 fast steps. T_fast = 0 is the plain autoregressive decoder.
"""

from itertools import product
from typing import Any

from optuna.distributions import CategoricalDistribution

from ltm_pyro.runs import load_run
from ltm_pyro.studies.scaling import WIDTHS, decoder
from ltm_pyro.studies.search import Setting, score, train_and_score
from ltm_pyro.studies.search.files import recipe_file

TRAINED, TESTED = (0, 1, 2, 4, 8, 16), (0, 4, 16, 64)

recipe = recipe_file("scaling.yaml")
space = {"width": CategoricalDistribution(WIDTHS), "steps": CategoricalDistribution(TRAINED)}
points = tuple({"width": width, "steps": steps} for width, steps in product(WIDTHS, TRAINED))


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Width and T_fast; without fast steps there is no use for thoughts."""
    return decoder(parameters["width"], 4 if parameters["steps"] else 0, parameters["steps"])


def objective(setting: Setting) -> dict[str, float]:
    """What `train_and_score` says, and the bound after every number of fast steps at test time (``bound_at_16``)."""
    figures = train_and_score(setting)
    run = load_run(setting.run)
    tested = TESTED if setting.parameters["steps"] else ()
    return figures | {f"bound_at_{steps}": score(run, setting, steps)["bound"] for steps in tested}
