"""`ltm data verify DIR`: compares every shard with size and checksum in the manifest."""

import argparse

from rich.progress import track

from ltm_pyro.data.dataset import open_pack
from ltm_pyro.data.shards import damage
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm data verify` to ``parser``."""
    parser.add_argument("pack", metavar="DIR", help="a packed corpus: folder or URL")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Reads all shards; returns 0 if none is damaged. Raises `UsageError` after printing what is wrong with which."""
    manifest, _ = open_pack(args.pack)
    files = sum(len(split.shards) + (split.lengths is not None) for split in manifest.splits.values())
    console = Console(stderr=True)
    found = track(
        damage(args.pack, manifest),
        "verifying",
        files,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    damaged = {file: problem for _, file, problem in found if problem}
    if args.json:
        print_json({"pack": args.pack, "files": files, "damaged": damaged})
    else:
        for problem in damaged.values():
            print(problem)
    if damaged:
        raise UsageError(f"{len(damaged)} of {files} files of {args.pack} are damaged: {', '.join(damaged)}.")
    if not args.json:
        print(f"{args.pack}: all {files} files are intact.")
    return 0
