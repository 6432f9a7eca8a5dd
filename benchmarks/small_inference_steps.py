"""What do fast steps buy? The study `inference_steps` at one width, which two cores finish in ten minutes.

ltm study run benchmarks/small_inference_steps.py --budget 1e11flops --set data.directory=DATA
"""

from ltm_pyro.studies import inference_steps
from ltm_pyro.studies.inference_steps import (  # noqa: F401 - they are this study's too
    analyse,
    checks,
    figures,
    objective,
    recipe,
    settings,
    space,
)

points = tuple(point for point in inference_steps.points if point["width"] == 32 and point["steps"] < 16)
