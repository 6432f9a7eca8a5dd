"""`ltm check-prior RECIPE_OR_RUN`: what a prior's thoughts are like, and their effect on the decoder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.table import Table

from ltm_pyro.cli.arguments import add_seed, add_trust, at_least
from ltm_pyro.cli.calibrate import check_picture, write_picture
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

if TYPE_CHECKING:
    from ltm_pyro.analysis.prior_predictive import PriorPredictive
    from ltm_pyro.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm check-prior`."""
    parser.add_argument("source", metavar="RECIPE_OR_RUN", help="recipe (YAML) before training, or a run directory")
    about = "packed data or text that the decoder reads; by default the held-out data of the recipe or run"
    parser.add_argument("--data", metavar="DIR_OR_TEXT", help=about)
    parser.add_argument("--samples", type=at_least(2), default=32, metavar="S", help="draws of z for each sequence")
    parser.add_argument(
        "--sequences", type=at_least(1), default=8, metavar="N", help="sequences that the decoder reads"
    )
    parser.add_argument("--texts", type=at_least(0), default=3, metavar="N", help="texts to write from draws of z")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot the draws and their effect (.png, .svg, …)")
    about = "of a recipe, as for `ltm fit`; repeatable"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=about)
    add_seed(parser)
    add_trust(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Draws, prints and plots; returns 0."""
    if args.picture:
        args.picture = check_picture(args.picture, args.force)
    from itertools import islice

    from ltm_pyro.analysis.prior_predictive import prior_predictive
    from ltm_pyro.data import load_text_or_pack
    from ltm_pyro.evaluation.evaluate import held_out
    from ltm_pyro.text.generation import generate
    from ltm_pyro.text.sampling import Sampling

    source = _load(args.source, args.option, args.trust)
    place = (source.tokenizer, source.length)
    data = (
        load_text_or_pack(args.data, *place)
        if args.data
        else held_out(source, score=source.score, observe=source.observe)
    )
    batch = data.collate([*islice(data, args.sequences)])
    found = prior_predictive(source.model, source.guide, batch, source.inference, args.samples, args.seed)
    sampling = Sampling(max_new_tokens=min(64, source.length))
    texts = generate(source, [""] * args.texts, sampling, seed=args.seed) if args.texts else []
    if args.picture:
        from ltm_pyro.analysis.pictures.prior_predictive import plot_prior_predictive

        write_picture(plot_prior_predictive(found), args.picture)
    if args.json:
        print_json(found.as_dict() | {"source": args.source, "texts": texts})
    else:
        _print(found, args.source, texts)
    return 0


def _load(source: str, options: list[str], trust: bool) -> "Run":
    """A run; or what a recipe describes, as it is before the first step, with the tokenizer of its data."""
    if source.endswith(".py"):
        raise UsageError(
            f"{source} is no recipe and no run: give a recipe, and the prior as --option model.prior={source}:NAME."
        )
    if not source.endswith((".yaml", ".yml")):
        if options:
            raise UsageError(f"--option {options[0]} would have no effect on a run: give a recipe, or leave it out.")
        from ltm_pyro.runs.load import load_run

        return load_run(source, trust=trust)
    from torch import nn

    from ltm_pyro.data import PackedDataset
    from ltm_pyro.runs.run import Run
    from ltm_pyro.training.check_model import check_labels
    from ltm_pyro.training.model_config import build_from_recipe
    from ltm_pyro.training.recipe import check_data, check_seed, is_stored, read_recipe
    from ltm_pyro.training.trust import may_read_data
    from ltm_pyro.utils.rng import seeded

    config = read_recipe(["--config", source, *(f"--{option}" for option in options), *(["--trust"] if trust else [])])
    check_seed(config)
    data, file = config.data.directory, Path(source).expanduser()
    if is_stored(file) and not may_read_data(data, file.read_text("utf-8"), trust):
        raise UsageError(f"The data of {source}, {data}, are outside the current folder and are not read: add --trust.")
    check_data(config)
    config.model.compile = False  # nothing here takes as long as that would
    with seeded(config.seed_everything):
        built = build_from_recipe(config)
    cast(nn.Module, built.model).eval()
    pack = PackedDataset.open(data, "train")
    check_labels(built.model, pack.manifest.labels, data)
    return Run(
        model=built.model,
        guide=built.guide,
        tokenizer=pack.tokenizer,
        inference=built.inference,
        data=data,
        length=config.model.decoder.init_args.length,
        source=source,
        score=config.data.score,
        observe=config.data.observe,
    )


def _print(found: "PriorPredictive", source: str, texts: list[str]) -> None:
    console = Console()
    table = Table(*("site", "prior", "shape", "mean", "sd", "least", "2.5 %", "median", "97.5 %", "most"))
    table.title = f"{found.prior} of {source}: draws of z"
    for x in found.sites:
        numbers = [f"{value:.3g}" for value in (x.mean, x.sd, *x.quantiles)]
        table.add_row(x.site, x.family, " ".join(map(str, x.shape)), *numbers)
    console.print(table)
    table = Table("effect on the decoder", found.prior, "N(0, I)")
    ours, theirs = found.effect, found.effect_of_standard_normal
    for layer, added in ours.added.items():
        table.add_row(
            f"layer {layer}: RMS of cross-attention / RMS of hidden states",
            f"{added:.3g}",
            f"{theirs.added[layer]:.3g}",
        )
    table.add_row("information on the next token, nats", f"{ours.information:.3g}", f"{theirs.information:.3g}")
    if found.kl is not None:
        table.add_row("KL where q starts, nats per sequence", f"{found.kl:.3g}", "")
    console.print(table)
    for sentence in found.verdicts():
        console.print(sentence, soft_wrap=True)
    for text in texts:
        console.print(f"A text from the prior: {text!r}", markup=False, soft_wrap=True)
