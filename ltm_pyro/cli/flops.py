"""`ltm flops --config FILE`: FLOPs per trained token, by the paper's formula and as this code computes."""

import argparse
import json

from rich.table import Table

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm flops`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe (YAML)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints parameters and FLOPs per token; returns 0."""
    from ltm_pyro.data import read_manifest
    from ltm_pyro.data.manifest import is_pack
    from ltm_pyro.training.flops import flops_per_token, flops_per_token_as_published
    from ltm_pyro.training.recipe import build_module, read_recipe

    config = read_recipe(["--config", args.config])
    if config.model.vocabulary is None:
        if not is_pack(config.data.directory):
            raise UsageError(
                f"{args.config} has no vocabulary, and there is no packed data at {config.data.directory} to take one "
                f"from: add `model.vocabulary` to the recipe."
            )
        config.model.vocabulary = read_manifest(config.data.directory).vocabulary
    module = build_module(config)
    decoder, inference = module.model.decoder, module.inference
    published = flops_per_token_as_published(decoder, decoder.length, inference.steps)
    computed = flops_per_token(decoder, module.guide, decoder.length, inference)
    figures = {
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "published_flops_per_token": published.total,
        "flops_per_token": computed.total,
        "fast_flops_per_token": computed.fast,
        "slow_flops_per_token": computed.slow,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        table = Table("", "", title=args.config)
        for name, value in figures.items():
            table.add_row(name.replace("_", " "), f"{value:,.0f}")
        Console().print(table)
    return 0
