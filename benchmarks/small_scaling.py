"""Does it scale? The study `scaling` on a grid that two cores finish in a quarter of an hour.

    ltm study run benchmarks/small_scaling.py --set data.directory=DATA

Two budgets and three ways of thinking, for three widths and two seeds each.
"""

from ltm_pyro.studies import scaling
from ltm_pyro.studies.scaling import checks, recipe, settings  # noqa: F401 - they are this study's too
from ltm_pyro.studies.search.definition import Row

WIDTHS: scaling.Widths = {1e11: (8, 16, 32), 4e11: (16, 32, 64)}

space = scaling.space_of(WIDTHS)
points = scaling.points_of(WIDTHS, ((0, 0), (4, 2), (4, 8)))


def analyse(rows: list[Row]) -> tuple[dict[str, bytes], list[str]]:
    """As in `scaling`; two budgets make no power law."""
    pictures, said = scaling.analyse(rows, WIDTHS)
    return {name: picture for name, picture in pictures.items() if name != "frontier"}, said
