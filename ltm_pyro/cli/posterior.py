"""`ltm posterior RUN`: draws from the posterior of every text's thoughts, as netCDF for ArviZ and `ltm report`."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_seed, add_trust, add_workers, at_least
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import check_file, local_path, writing

if TYPE_CHECKING:
    from ltm_pyro.analysis import Posterior
    from ltm_pyro.analysis.embeddings import Near


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm posterior`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--input", required=True, metavar="FILE", help=".txt or .jsonl; other JSONL values are labels")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="netCDF, or zarr if it ends in .zarr")
    parser.add_argument("--id", metavar="FIELD", help="the field that names a document; by default file and line do")
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
    parser.add_argument(
        "--temperatures",
        type=at_least(1),
        metavar="N",
        help="check each evidence by annealed importance sampling through N distributions",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="write block by block into a .zarr store that the same command continues; several processes share the "
        "work under torchrun, srun or a SLURM array",
    )
    parser.add_argument(
        "--keep-draws", type=at_least(0), metavar="N", help="draws per sequence that --stream stores; all by default"
    )
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="means, sd and labels as a Parquet table too")
    parser.add_argument("--nearest", metavar="POSTERIOR", help="print the texts of a posterior nearest to each text")
    parser.add_argument("--chains", type=at_least(2), default=2, metavar="C", help="Markov chains per sequence")
    parser.add_argument("--warmup", type=at_least(1), default=200, metavar="N", help="discarded steps of each chain")
    add_device(parser)
    add_workers(parser)
    add_trust(parser)
    add_seed(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Draws the posterior, writes the files and prints a summary; returns 0."""
    if args.stream and args.out.suffix != ".zarr":
        raise UsageError(f"--stream writes a zarr store, and {args.out} does not end in .zarr: choose another --out.")
    if args.keep_draws is not None and not args.stream:
        raise UsageError("--keep-draws belongs to --stream: add it, or draw fewer --samples.")
    if args.embeddings:
        extra("pyarrow.parquet", "parquet", "A table of embeddings")
        beside = (args.out, args.input, args.nearest)
        args.embeddings = check_out(args.embeddings, args.force, "--embeddings", beside)
    args.out = check_out(args.out, args.force or args.stream, others=(args.input, args.nearest))
    # imported here, because --help must not wait for them
    from ltm_pyro.analysis import ChainOptions, DrawOptions, Posterior, draw_posterior, read_texts
    from ltm_pyro.inference.ais import Annealing
    from ltm_pyro.runs.load import load_run
    from ltm_pyro.utils.parallel import all_cores

    options = DrawOptions(
        method=args.method,
        samples=args.samples,
        chains=ChainOptions(chains=args.chains, warmup=args.warmup),
        replicas=args.replicas,
        annealing=Annealing(temperatures=args.temperatures) if args.temperatures else None,
    )
    known = Posterior.load(args.nearest) if args.nearest else None
    texts = read_texts(args.input, args.id)[: args.limit]
    trained = load_run(args.run, args.device, args.trust)
    asked: dict[str, Any] = {"options": options, "steps": args.fast_steps, "longer": args.longer, "seed": args.seed}
    asked["workers"] = args.workers or all_cores(trained.device)
    if args.stream:
        from ltm_pyro.analysis.stream import Place, blocks_of, stream_posterior

        place = Place.of_environment(os.environ)
        if args.force and place.size > 1:
            raise UsageError("One of several processes cannot replace what the others write: delete the store first.")
        how = {"keep": args.keep_draws, "place": place, "replace": args.force}
        if not stream_posterior(trained, texts, args.out, **how, **asked):
            print(f"Process {place.rank} of {place.size} is done; others are not yet.", file=sys.stderr)
            return 0
        parts: Iterable[Posterior] = blocks_of(args.out)
    else:
        posterior = draw_posterior(trained, texts, **asked)
        posterior.save(args.out)
        parts = [posterior]
    figures = merged([summary(part) for part in parts])
    if args.embeddings:
        from ltm_pyro.analysis.embeddings import write_embeddings

        write_embeddings(blocks_of(args.out) if args.stream else parts, args.embeddings)
    near = None
    if known is not None:
        from ltm_pyro.analysis.embeddings import nearest

        near = [row for part in (blocks_of(args.out) if args.stream else parts) for row in nearest(known, part)]
    if args.json:
        as_rows = {} if near is None else {"nearest": [[x._asdict() for x in row] for row in near]}
        print_json({"out": str(args.out)} | figures | as_rows)
        return 0
    Console().print(_table(figures, str(args.out)))
    if near is not None and known is not None:
        Console().print(_near_table(near, known))
    given = args.out if args.method == "guide" else f"POSTERIOR --reference {args.out}"
    if args.keep_draws != 0:  # a report needs draws
        print(f"Next: ltm report {given} --run {args.run} --out report.html", file=sys.stderr)
    return 0


def check_out(path: Path, force: bool, option: str = "--out", others: Iterable[object] = ()) -> Path:
    """The absolute path of an output; refuses one that exists or cannot be written, before hours of work.

    Args:
        others: what the same command reads or writes, which ``force`` does not replace either.
    """
    path = local_path(path, option)
    if any(other is not None and local_path(str(other), option).resolve() == path.resolve() for other in others):
        raise UsageError(f"{path} is another file of this command already: choose another {option}.")
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


def names_of(paths: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """A name for each of several files, which are not to be the same: its stem, or its path where stems are alike."""
    if twice := next((path for path, count in Counter(paths).items() if count > 1), None):
        raise UsageError(f"{twice} is given twice: leave one out.")
    stems = Counter([*(Path(path).stem for path in paths), *taken])
    return {path: Path(path).stem if stems[Path(path).stem] == 1 else path for path in paths}


def summary(posterior: "Posterior") -> dict[str, float]:
    """Figures of all sequences together; bounds and KL in nats per sequence."""
    from ltm_pyro.inference.pareto import TRUSTED

    stats = posterior.stats
    figures: dict[str, float] = {"sequences": posterior.size, "tokens": posterior.tokens}
    for name in ("elbo", "iwae", "ais", "kl"):
        if name in stats:
            figures[f"mean_{name}"] = float(stats[name].mean(skipna=False))
    if "pareto_k" in stats:
        figures["pareto_k_above_0.7"] = int((~(stats["pareto_k"] <= TRUSTED)).sum())
    if "r_hat" in stats:
        figures |= {"max_r_hat": float(stats["r_hat"].max()), "min_ess": float(stats["ess"].min())}
        figures["min_ess_tail"] = float(stats["ess_tail"].min())
        if "diverging" in stats:  # with --keep-draws 0 it is not stored
            figures["divergences"] = int(stats["diverging"].sum())
    return figures


def merged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The summary of several parts together."""
    found: dict[str, float] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.startswith("mean_"):
            found[name] = sum(x * part["sequences"] for x, part in zip(values, parts, strict=True)) / found["sequences"]
        else:
            found[name] = min(values) if name.startswith("min_") else max(values) if "max_" in name else sum(values)
    return found


def _near_table(near: Sequence[Sequence["Near"]], known: "Posterior") -> Table:
    table = Table("text", "nearest", "distance (prior sd)", "probability", "its text", title_justify="left")
    table.title = "Nearest texts, by the thoughts"
    for number, row in enumerate(near):
        for place, x in enumerate(row):
            name, text = str(known.documents[x.sequence]), known.texts[x.sequence][:60]
            table.add_row(str(number) if place == 0 else "", name, f"{x.distance:.2f}", f"{x.probability:.2f}", text)
    return table


def _table(figures: dict[str, float], title: str) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, x in figures.items():
        unit = ", nats per sequence" if name.startswith("mean_") else ""
        table.add_row(name.replace("_", " ") + unit, f"{x:,}" if isinstance(x, int) else f"{x:,.3f}")
    return table
