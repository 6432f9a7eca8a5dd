"""`ltm report POSTERIOR`: every diagnostic with its verdict on one page of HTML."""

import argparse
import sys
from pathlib import Path

from ltm_pyro.cli.posterior import check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm report`."""
    parser.add_argument("posterior", metavar="POSTERIOR", help="what `ltm posterior` wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page (.html)")
    parser.add_argument("--run", metavar="RUN", help="the run; where the posterior says it was by default")
    parser.add_argument("--calibration", metavar="FILE", help="what `ltm calibrate --out` wrote")
    parser.add_argument(
        "--reference", metavar="FILE", help="what `ltm posterior --method nuts` wrote for some of the texts"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns 0."""
    check_out(args.out, args.force)
    from ltm_pyro.analysis import Posterior  # here, so that --help need not wait
    from ltm_pyro.analysis.calibration import Calibration
    from ltm_pyro.analysis.report import write_report
    from ltm_pyro.analysis.sections import ReportInputs
    from ltm_pyro.runs.load import load_run

    posterior = Posterior.load(args.posterior)
    known = str(posterior.attrs.get("run", ""))
    place = args.run or (known if known and Path(known).exists() else None)
    if place is None:
        print(f"The run is not at {known or 'a known place'}: sections that need it are left out.", file=sys.stderr)
    material = ReportInputs(
        posterior=posterior,
        run=load_run(place) if place else None,
        calibration=Calibration.load(args.calibration) if args.calibration else None,
        reference=Posterior.load(args.reference) if args.reference else None,
    )
    write_report(material, args.out)
    print(f"Written: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
    return 0
