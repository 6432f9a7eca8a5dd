"""`ltm data show DIR`: counts, document lengths and sample sequences of a packed corpus."""

import argparse

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ltm_pyro.cli.arguments import add_seed, at_least
from ltm_pyro.cli.data import counts, summary
from ltm_pyro.data.describe import Description, describe
from ltm_pyro.data.manifest import read_manifest
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

_BAR = 40  # characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm data show` to ``parser``."""
    parser.add_argument("pack", metavar="DIR", help="a packed corpus: folder or URL")
    parser.add_argument("--split", default="train", metavar="NAME", help="train, val or test")
    parser.add_argument("--samples", type=at_least(0), default=3, metavar="N", help="sequences to decode")
    add_seed(parser, "random seed of the sequences shown")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints counts, document lengths and decoded sequences; returns 0."""
    manifest = read_manifest(args.pack)
    found = describe(args.pack, args.split, args.samples, args.seed)
    if args.json:
        print_json(summary(manifest, args.pack) | {"split": args.split, **found._asdict()})
        return 0
    console = Console()
    console.print(counts(manifest, args.pack))
    console.print(_histogram(found))
    for sample in found.samples:
        labels = "".join(f", {name}: {value}" for name, value in sample["labels"].items() if value is not None)
        begins = f" from token {sample['offset']}" if sample["offset"] else ""
        prompt = "" if sample["prompt"] is None else f", {sample['prompt']} tokens of prompt"
        title = f"sequence {sample['id']}: {', '.join(map(str, sample['documents']))}{begins}{prompt}{labels}"
        console.print(Panel(Text(sample["text"]), title=Text(title), title_align="left"))
    return 0


def _histogram(found: Description) -> Table:
    table = Table("tokens", "documents", "", title="lengths of documents", title_justify="left")
    most = max(found.lengths.values())
    for span, count in found.lengths.items():
        table.add_row(span, f"{count:,}", "█" * -(-_BAR * count // most))
    return table
