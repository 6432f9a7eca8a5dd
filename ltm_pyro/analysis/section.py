"""What a section of a report is, and what it is made from."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from ltm_pyro.analysis.calibration import Calibration
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run


class Table(NamedTuple):
    """Column titles and rows of formatted cells."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Point(NamedTuple):
    """A sequence on the map: its place, its class with a colour, and what is shown where the pointer rests on it."""

    sequence: int
    x: float
    y: float
    kind: str
    color: str
    name: str


class Section(NamedTuple):
    """The result of one diagnostic."""

    verdict: str
    pictures: tuple[Axes, ...] = ()
    tables: tuple[Table, ...] = ()
    good: bool | None = None  # None if the diagnostic does not judge q
    points: tuple[Point, ...] = ()


class ReportInputs(NamedTuple):
    """What a report is made from; everything but the posterior is optional.

    ``against`` are posteriors of the same texts under other models, by name; ``statistics`` the user's own, of a text.
    """

    posterior: Posterior
    run: Run | None = None
    calibration: Calibration | None = None
    reference: Posterior | None = None
    against: Mapping[str, Posterior] = {}
    statistics: Mapping[str, Callable[[str], float]] = {}

    def need_run(self) -> Run:
        """The run, for sections that need the decoder; `UsageError` without one."""
        if self.run is None:
            raise UsageError("Needs the run: give --run.")
        return self.run
