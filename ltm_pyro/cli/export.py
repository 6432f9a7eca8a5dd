"""`ltm export RUN --out DIR`: writes a trained model as safetensors, recipe, tokenizer and model card."""

import argparse

from ltm_pyro.cli.arguments import add_trust
from ltm_pyro.utils.as_json import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm export`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in that folder")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the folder and prints its files; returns 0."""
    from ltm_pyro.runs.export import save_pretrained

    folder = save_pretrained(args.run, args.out, force=args.force, trust=args.trust)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if args.json:
        print_json({"out": str(folder), "files": sizes})
    else:
        print("\n".join(f"{folder / name}  {size:,} bytes" for name, size in sizes.items()))
    return 0
