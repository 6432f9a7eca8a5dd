"""`ltm posterior RUN`: draws from the posterior of every text's thoughts, as netCDF for ArviZ and `ltm report`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_seed, add_trust, at_least
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import check_file, local_path, writing

if TYPE_CHECKING:
    from ltm_pyro.analysis import Posterior


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm posterior`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--input", required=True, metavar="FILE", help=".txt or .jsonl; other JSONL values are labels")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="netCDF, or zarr if it ends in .zarr")
    parser.add_argument(
        "--method",
        default="guide",
        choices=("guide", "nuts", "langevin"),
        help="fit q and draw from it, or run Markov chains",
    )
    parser.add_argument("--samples", type=at_least(1), default=100, metavar="S", help="draws per sequence and chain")
    parser.add_argument(
        "--longer", default="refuse", choices=("refuse", "cut", "split"), help="what to do with texts that are too long"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N texts")
    parser.add_argument(
        "--fast-steps", type=at_least(0), metavar="N", help="fast steps per fit; by default the recipe's"
    )
    parser.add_argument("--replicas", type=at_least(0), default=0, metavar="R", help="texts to generate from each q")
    parser.add_argument("--chains", type=at_least(2), default=2, metavar="C", help="Markov chains per sequence")
    parser.add_argument("--warmup", type=at_least(1), default=200, metavar="N", help="discarded steps of each chain")
    add_device(parser)
    add_trust(parser)
    add_seed(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Draws the posterior, writes the file and prints a summary; returns 0."""
    args.out = check_out(args.out, args.force)
    # imported here, because --help must not wait for them
    from ltm_pyro.analysis import ChainOptions, DrawOptions, draw_posterior, read_texts
    from ltm_pyro.runs.load import load_run

    chains = ChainOptions(chains=args.chains, warmup=args.warmup)
    options = DrawOptions(method=args.method, samples=args.samples, chains=chains, replicas=args.replicas)
    texts = read_texts(args.input)[: args.limit]
    trained = load_run(args.run, args.device, args.trust)
    posterior = draw_posterior(trained, texts, options, args.fast_steps, longer=args.longer, seed=args.seed)
    posterior.save(args.out)
    figures = summary(posterior)
    if args.json:
        print_json({"out": str(args.out)} | figures)
    else:
        Console().print(_table(figures, str(args.out)))
        given = args.out if args.method == "guide" else f"POSTERIOR --reference {args.out}"
        print(f"Next: ltm report {given} --run {args.run} --out report.html", file=sys.stderr)
    return 0


def check_out(path: Path, force: bool, option: str = "--out") -> Path:
    """The absolute path of an output; refuses one that exists or cannot be written, before hours of work."""
    path = local_path(path, option)
    with writing(path, option):  # a name may be too long
        there = path.exists()
    if there and not force:
        raise UsageError(f"{path} exists already: choose another {option}, or add --force.")
    if path.is_dir():
        from ltm_pyro.analysis.storage import is_store

        if not is_store(path):
            raise UsageError(f"{path} is a folder, which --force does not replace: choose another {option}.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}: make it, or choose another {option}.")
    check_file(path, option)
    return path


def summary(posterior: "Posterior") -> dict[str, float]:
    """Figures of all sequences together; bounds and KL in nats per sequence."""
    from ltm_pyro.inference.pareto import TRUSTED

    stats = posterior.stats
    figures: dict[str, float] = {"sequences": posterior.size, "tokens": posterior.tokens}
    for name in ("elbo", "iwae", "kl"):
        if name in stats:
            figures[f"mean_{name}"] = float(stats[name].mean(skipna=False))
    if "pareto_k" in stats:
        figures["pareto_k_above_0.7"] = int((~(stats["pareto_k"] <= TRUSTED)).sum())
    if "r_hat" in stats:
        figures |= {"max_r_hat": float(stats["r_hat"].max()), "min_ess": float(stats["ess"].min())}
    if "diverging" in stats:  # not in files of before
        figures |= {"min_ess_tail": float(stats["ess_tail"].min()), "divergences": int(stats["diverging"].sum())}
    return figures


def _table(figures: dict[str, float], title: str) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, x in figures.items():
        unit = ", nats per sequence" if name.startswith("mean_") else ""
        table.add_row(name.replace("_", " ") + unit, f"{x:,}" if isinstance(x, int) else f"{x:,.3f}")
    return table
