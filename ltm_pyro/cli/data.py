"""`ltm data pack`: packs text into shards of tokens."""

import argparse
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ltm_pyro.cli.arguments import add_seed, at_least, names
from ltm_pyro.data.manifest import Manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

INPUTS = ".txt, .jsonl (also .gz and .zst) or .parquet file, a folder of them, or hf:NAME[:CONFIG]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm data pack` to ``parser``."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--tokenizer", default="bpe:4096", metavar="bpe:SIZE|PATH", help="train a tokenizer, or load one"
    )
    parser.add_argument("--seq-len", type=at_least(1), default=128, metavar="N", help="tokens per sequence")
    about = "what a row of tokens is: a document (or a piece of a long one), or a cut out of a stream of them"
    parser.add_argument("--rows", choices=("documents", "stream"), default="documents", help=about)
    about = "fields that are kept as labels of each document, comma-separated"
    parser.add_argument("--label", type=names, default=(), metavar="NAMES", help=about)
    parser.add_argument("--id", metavar="FIELD", help="field that is each document's id, instead of file:line")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="F", help="share of documents in val")
    parser.add_argument("--test-fraction", type=float, default=0.02, metavar="F", help="share of documents in test")
    add_seed(parser, "random seed of the splits")
    about = "drop documents that are equal or similar to an earlier one"
    parser.add_argument("--drop-duplicates", choices=("exact", "near"), help=about)
    about = "documents that are never in different splits: equal or similar ones"
    parser.add_argument("--keep-together", choices=("exact", "near"), default="near", help=about)
    parser.add_argument("--force", action="store_true", help="replace an existing pack")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Packs the text, prints a table or one JSON object; returns 0. Raises `UsageError`."""
    spinner = (SpinnerColumn(), TextColumn("packing, {task.completed:,.0f} tokens written"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*spinner, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pack", total=None)
        manifest = pack(
            args.inputs,
            args.out,
            tokenizer=args.tokenizer,
            seq_len=args.seq_len,
            rows=args.rows,
            labels=args.label,
            id=args.id,
            val_fraction=args.val_fraction,
            test_fraction=args.test_fraction,
            keep_together=args.keep_together,
            seed=args.seed,
            drop_duplicates=args.drop_duplicates,
            force=args.force,
            progress=lambda tokens: bar.advance(task, tokens),
        )
    if args.json:
        print_json(summary(manifest, args.out))
    else:
        Console().print(counts(manifest, args.out))
    return 0


def summary(manifest: Manifest, out: str) -> dict[str, Any]:
    """The manifest for JSON, with the number of shards instead of their list."""
    summary = {"out": out} | manifest.to_dict()
    for split in summary["splits"].values():
        split["shards"] = len(split["shards"])
    return summary


def described(manifest: Manifest) -> str:
    """The task that made a pack, and its options."""
    options = ", ".join(f"{name} {value}" for name, value in manifest.task["options"].items())
    return f"{manifest.task['name']} ({options})" if options else str(manifest.task["name"])


def counts(manifest: Manifest, out: str) -> Table:
    """A table of the manifest's counts, one row per split."""
    what = "documents in rows of up to" if manifest.rows == "documents" else "rows of a stream, of"
    title = f"{out}: {what} {manifest.seq_len} tokens, vocabulary {manifest.vocabulary:,}"
    title += f", task {described(manifest)}" if manifest.task else ""
    title += f", labels {', '.join(manifest.labels)}" if manifest.labels else ""
    title += f", {manifest.prompts:,} with a prompt" if manifest.prompts else ""
    title += f", {manifest.dropped:,} duplicates left out" if manifest.dropped else ""
    columns = ("documents", "sequences", "tokens", "bytes", "shards")
    table = Table("split", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for name, split in summary(manifest, out)["splits"].items():
        table.add_row(name, *(f"{split[column]:,}" for column in columns))
    return table
