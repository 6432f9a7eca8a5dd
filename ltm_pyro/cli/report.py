"""`ltm report POSTERIOR`: all diagnostics, each with a verdict, as one HTML page."""

import argparse
import sys
from pathlib import Path

from ltm_pyro.cli.arguments import add_trust
from ltm_pyro.cli.posterior import check_out, names_of
from ltm_pyro.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm report`."""
    parser.add_argument("posterior", metavar="POSTERIOR", help="a file that `ltm posterior` wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page (.html)")
    parser.add_argument("--run", metavar="RUN", help="the run that the posterior is from, for sections that need it")
    parser.add_argument("--calibration", metavar="FILE", help="a file that `ltm calibrate --out` wrote")
    parser.add_argument(
        "--reference", metavar="FILE", help="a file that `ltm posterior --method nuts` wrote for some of the texts"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FILE",
        help="a posterior of the same texts under another model or seed; repeatable",
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE.py",
        help="your own statistics of a text, for the predictive checks; the file is executed, which needs --trust",
    )
    add_trust(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns 0."""
    others = (args.posterior, args.calibration, args.reference, args.statistics, *args.against)
    args.out = check_out(args.out, args.force, others=others)
    # imported here, because --help must not wait for them
    from ltm_pyro.analysis import Posterior
    from ltm_pyro.analysis.calibration import Calibration
    from ltm_pyro.analysis.predictive import load_statistics
    from ltm_pyro.analysis.report import write_report
    from ltm_pyro.analysis.section import ReportInputs
    from ltm_pyro.runs.load import load_run

    statistics = load_statistics(args.statistics, args.trust) if args.statistics else {}
    posterior = Posterior.load(args.posterior)
    if not posterior.has("posterior"):
        raise UsageError(f"{args.posterior} has no draws, which a report needs: draw it again without --keep-draws 0.")
    inputs = ReportInputs(
        posterior=posterior,
        run=None if args.run is None else load_run(args.run, trust=args.trust),
        calibration=Calibration.load(args.calibration) if args.calibration else None,
        reference=Posterior.load(args.reference) if args.reference else None,
        against={name: Posterior.load(path) for path, name in names_of(args.against, ["this"]).items()},
        statistics=statistics,
    )
    stored = str(posterior.attrs.get("run", ""))
    if args.run is None:  # the file may come from anybody, so the run that it names is not loaded unasked
        named = f"The posterior names the run {stored!r}" if stored else "The posterior names no run"
        print(f"{named}: sections that need it are left out; give --run.", file=sys.stderr)
    write_report(inputs, args.out)
    print(f"Written: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
    return 0
