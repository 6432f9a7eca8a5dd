"""`ltm flops --config FILE`: FLOPs per trained token, by the paper's formula and as this code computes."""

import argparse
from pathlib import Path

from rich.table import Table

from ltm_pyro.cli.arguments import add_trust
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.safe_yaml import load_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm flops`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe (YAML)")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints parameters and FLOPs per token; returns 0."""
    from ltm_pyro.training.flops import flops_per_token, flops_per_token_as_published
    from ltm_pyro.training.model_config import build_from_recipe, read_model_recipe
    from ltm_pyro.training.recipe import take_vocabulary
    from ltm_pyro.training.trust import may_read_data

    config = read_model_recipe(args.config, args.trust)
    place = config.data.directory
    if config.model.vocabulary is None and not may_read_data(place, Path(args.config).read_text("utf-8"), args.trust):
        raise UsageError(
            f"The recipe gives no vocabulary, and its data, {place}, are outside the current folder and not read "
            f"unasked: add `model.vocabulary` to the recipe, or --trust."
        )
    take_vocabulary(config)
    model, guide, inference, _ = build_from_recipe(config)
    decoder = model.decoder
    published = flops_per_token_as_published(decoder, decoder.length, inference.steps)
    keeps = load_yaml(Path(args.config).read_text("utf-8"))["model"].get("keep_local")  # a key of training only
    fresh = inference if keeps else inference.from_start()
    spent = flops_per_token(decoder, guide, decoder.length, fresh)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "published_flops_per_token": published.total,
        "flops_per_token": spent.total,
        "fast_flops_per_token": spent.fast,
        "slow_flops_per_token": spent.slow,
    }
    if args.json:
        print_json(figures)
    else:
        table = Table("", "", title=args.config)
        for name, value in figures.items():
            table.add_row(name.replace("_", " "), f"{value:,.0f}")
        Console().print(table)
    return 0
