"""`ltm calibrate RUN`: simulation-based calibration of q on texts that the model generates."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_seed, add_trust, add_workers, at_least
from ltm_pyro.cli.posterior import check_out
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import atomic_write, writing

if TYPE_CHECKING:
    from ltm_pyro.analysis.calibration import Calibration

LEVELS = (0.5, 0.8, 0.9, 0.95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm calibrate`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument(
        "--simulations", type=at_least(1), default=100, metavar="N", help="texts to generate and fit q to"
    )
    parser.add_argument("--samples", type=at_least(1), default=99, metavar="S", help="draws per text: 9, 19, … 99")
    parser.add_argument(
        "--fast-steps", type=at_least(0), metavar="N", help="fast steps per fit; by default the recipe's"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="ranks as netCDF, for `ltm report --calibration`")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="plot rank histogram, ECDF and coverage (.png, .svg, …)"
    )
    add_device(parser)
    add_workers(parser)
    add_trust(parser)
    add_seed(parser)
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the simulations and prints p-values and coverage; returns 0."""
    if args.out:
        args.out = check_out(args.out, args.force)
    if args.picture:
        args.picture = check_picture(args.picture, args.force, [args.out])
    from dataclasses import replace

    from ltm_pyro.analysis.calibration import calibrate, simulate_texts
    from ltm_pyro.runs.load import load_run
    from ltm_pyro.utils.parallel import all_cores

    trained = load_run(args.run, args.device, args.trust)
    inference = trained.inference
    if args.fast_steps is not None:
        inference = replace(inference, steps=args.fast_steps)
    simulate = simulate_texts(trained)
    workers = args.workers or all_cores(trained.device)
    asked = {"simulations": args.simulations, "samples": args.samples, "seed": args.seed, "workers": workers}
    found = calibrate(trained.model, trained.guide, inference, simulate, **asked)
    if args.out:
        found.save(args.out)
    if args.picture:
        from ltm_pyro.analysis.pictures.calibration import plot_calibration

        write_picture(plot_calibration(found), args.picture)
    figures = summary(found)
    print_json(figures) if args.json else Console().print(_table(figures, args.run))
    return 0


def check_picture(path: Path, force: bool, others: Iterable[object] = ()) -> Path:
    """The absolute path of a picture; refuses, before the work, a format that is not known and a file that exists."""
    canvas = extra("matplotlib.backend_bases", "plots", "A picture").FigureCanvasBase
    formats = sorted(canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UsageError(f"No picture can be written as {path}: end its name in .{', .'.join(formats)}.")
    return check_out(path, force, "--picture", others)


def write_picture(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib in the format of the path's suffix."""
    with writing(path, "--picture"), atomic_write(path) as new:
        figure.savefig(new, dpi=150, format=path.suffix.lower().removeprefix("."))


def summary(found: "Calibration") -> dict[str, Any]:
    """p-values and coverage as a dictionary for JSON."""
    import numpy as np

    p_values, levels = found.p_values(), np.array(LEVELS)
    simulations, candidates, _ = found.values.shape
    return {
        "simulations": simulations,
        "samples": candidates - 1,
        "p_value": found.p_value(),
        "coverage": dict(zip(map(str, LEVELS), found.coverage(levels).tolist(), strict=True)),
        "attainable": dict(zip(map(str, LEVELS), found.attainable(levels).tolist(), strict=True)),
        "coordinates": len(p_values),
        "coordinates_below_0.01": sum(p < 0.01 for p in p_values.values()),
        "p_values": p_values,
    }


def _table(figures: dict[str, Any], title: str) -> Table:
    from ltm_pyro.analysis.calibration import LOG_LIKELIHOOD

    heading = f"{title}: {figures['simulations']} generated texts, {figures['samples']} draws of q each"
    table = Table("", "", "what it should be", title=heading, title_justify="left")
    table.add_row("p-value of 'q is the posterior'", f"{figures['p_value']:.3f}", "not small")
    below, total = figures["coordinates_below_0.01"], figures["coordinates"]
    table.add_row(f"p-value of {LOG_LIKELIHOOD} alone", f"{figures['p_values'][LOG_LIKELIHOOD]:.3f}", "not small")
    table.add_row("coordinates with p < 0.01", f"{below} of {total}", f"about {0.01 * total:.0f}")
    for level, share in figures["coverage"].items():
        expected = f"{figures['attainable'][level]:.0%}"
        table.add_row(f"{float(level):.0%} intervals contain the truth", f"{share:.1%}", expected)
    return table
