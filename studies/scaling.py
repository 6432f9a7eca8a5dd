"""Does it scale? Held-out bound over training FLOPs, for model sizes, thoughts and fast steps, beside the baseline.

Every point of the grid trains for exactly its FLOPs, fast steps included, so more fast steps mean fewer tokens. T_fast = 0
without thoughts is the plain autoregressive decoder. Half of the FLOPs go to a decoder without thoughts, as in the
quickstart. Cheap points come first: a study that is stopped early has complete curves up to some budget.
"""

from itertools import product
from typing import Any

from optuna.distributions import CategoricalDistribution

from ltm_pyro.studies.search.files import recipe_file

WIDTHS, FLOPS = (32, 64, 96), (1e11, 2e11, 4e11, 8e11)
THINKING = ((0, 0), (4, 2), (4, 8), (1, 8))  # (thoughts per layer K, T_fast)

recipe = recipe_file("scaling.yaml")
space = {
    "flops": CategoricalDistribution(FLOPS),
    "width": CategoricalDistribution(WIDTHS),
    "thoughts": CategoricalDistribution(sorted({k for k, _ in THINKING})),
    "steps": CategoricalDistribution(sorted({t for _, t in THINKING})),
}
points = tuple(
    {"flops": flops, "width": width, "thoughts": thoughts, "steps": steps}
    for flops, width, (thoughts, steps) in product(FLOPS, WIDTHS, THINKING)
)


def decoder(width: int, thoughts: int, steps: int) -> dict[str, Any]:
    """A model size, its thoughts and T_fast as recipe settings; the slow rate falls with the width (as in muP)."""
    later = [[0, 0], [0.5, 0], [0.5, steps], [1, steps]]
    return {
        "model.decoder.init_args.width": width,
        "model.decoder.init_args.heads": width // 16,
        "model.decoder.init_args.thoughts": thoughts,
        "model.curriculum.steps": later if thoughts else [[0, 0], [1, 0]],
        "model.slow.rate": 0.64 / width,
    }


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """A point of the grid; its FLOPs replace the study's budget."""
    chosen = {name: parameters[name] for name in ("width", "thoughts", "steps")}
    return decoder(**chosen) | {"model.max_flops": parameters["flops"]}
