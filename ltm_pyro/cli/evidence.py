"""`ltm evidence A.nc B.nc …`: posteriors of the same texts under several models, ranked by each document's evidence."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ltm_pyro.cli.calibrate import check_picture, write_picture
from ltm_pyro.cli.posterior import names_of
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

if TYPE_CHECKING:
    from ltm_pyro.analysis.model_comparison import Ranking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm evidence`."""
    parser.add_argument("posteriors", nargs="+", metavar="POSTERIOR", help="files that `ltm posterior` wrote")
    parser.add_argument(
        "--estimator",
        choices=("ais", "iwae"),
        help="of a document's evidence; by default ais if all files have it (`ltm posterior --temperatures N`)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot differences and weights (.png, .svg, …)")
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the ranking; returns 0."""
    if args.picture:
        args.picture = check_picture(args.picture, args.force, args.posteriors)
    from ltm_pyro.analysis import Posterior
    from ltm_pyro.analysis.model_comparison import rank

    found = {name: Posterior.load(path) for path, name in names_of(args.posteriors).items()}
    ranking = rank(found, args.estimator)
    if args.picture:
        from ltm_pyro.analysis.pictures.evidence import plot_ranking

        write_picture(plot_ranking(ranking).get_figure(root=True), args.picture)
    if args.json:
        print_json(ranking.as_dict())
        return 0
    Console().print(_table(ranking), _verdict(ranking))
    if ranking.doubt:
        Console().print(f"{ranking.doubt}, by more than the lead; `ltm posterior --temperatures 32` checks it.")
    if len({x.attrs.get("weights", name) for name, x in found.items()}) < len(found):
        Console().print("Some of these are posteriors of one model: what differs between them is how q was fitted.")
    return 0


def _table(ranking: "Ranking") -> Table:
    title = f"Evidence of {ranking.documents} documents by {ranking.estimator}, in nats"
    head = ("", "per document", "per token", "behind the first", "p", "weight", "k-hat > 0.7", "AIS above iwae")
    table = Table(*head, title=title, title_justify="left")
    for number, x in enumerate(ranking.candidates):
        table.add_row(
            x.name,
            f"{x.evidence:.2f} ± {x.stderr:.2f}",
            f"{x.nats_per_token:.4f}",
            f"{x.behind:.3f} ± {x.behind_stderr:.3f}" if number else "-",
            f"{x.p_value:.3g}" if number else "-",
            f"{x.weight:.3f}",
            str(x.untrusted),
            "-" if x.ais_gain is None else f"{x.ais_gain:.3f}",
        )
    return table


def _verdict(ranking: "Ranking") -> str:
    first, second = ranking.candidates[:2]
    if ranking.winner is None:
        return (
            f"No winner: {first.name} is first, but its lead of {second.behind:.3f} ± {second.behind_stderr:.3f} nats "
            f"per document over {second.name} may be chance."
        )
    return f"Winner: {ranking.winner}, {second.behind:.3f} ± {second.behind_stderr:.3f} nats per document ahead."
