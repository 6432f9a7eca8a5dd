"""`ltm show RUN_OR_CONFIG`: latent sites, shapes, the guide's local parameters and the plate diagram of a model."""

import argparse
from pathlib import Path
from typing import Any

from ltm_pyro.cli.arguments import add_trust
from ltm_pyro.contracts import Batch
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.files import atomic_write, check_file, local_path, writing

SEQUENCES, TOKENS = 2, 8  # of the batch whose shapes are shown
VOCABULARY = 256  # for a recipe without one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm show`."""
    parser.add_argument("source", metavar="RUN_OR_CONFIG", help="run directory, checkpoint, or recipe (YAML)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="plate diagram; by default NAME.svg")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints shapes and writes the diagram; returns 0."""
    import torch  # imported here, because --help must not wait for it
    from pyro import poutine

    from ltm_pyro.contracts import make_batch
    from ltm_pyro.inference.elbo import check_reparameterised, latent_sites
    from ltm_pyro.inference.local import init
    from ltm_pyro.inference.param_store import no_param_store
    from ltm_pyro.inference.plate_diagram import plate_diagram
    from ltm_pyro.inference.state import LocalInference

    svg = local_path(args.svg or Path(Path(args.source).stem + ".svg"), "--svg")
    check_file(svg, "--svg")
    model, guide = _parts(args.source, args.trust)
    tokens_BT = torch.ones(SEQUENCES, min(TOKENS, model.decoder.length), dtype=torch.long)
    batch = make_batch(tokens_BT, torch.full((SEQUENCES,), tokens_BT.shape[1]), start_token=0)
    with torch.no_grad(), no_param_store(model):
        trace = poutine.trace(model).get_trace(batch)
        local = init(model, guide, batch, LocalInference()).parameters
        if guide.uses_fast_steps:
            check_reparameterised(latent_sites(poutine.trace(guide).get_trace(batch, local)))
    _write(svg, plate_diagram(model, batch), args.force)
    latent = _latent(model)
    if args.json:
        print_json({"latent": latent, **_summary(trace, local, batch), "svg": str(svg)})
        return 0
    print(f"Latent sites of {type(model.prior).__name__}: name, shape, prior")
    for name, site in latent.items():
        scope = "each sequence" if site["of_each_sequence"] else "all sequences"
        print(f"  {name}  {' '.join(map(str, site['shape']))}  {site['prior']}, of {scope}")
    print(
        trace.format_shapes(
            title=f"p: {type(model.prior).__name__} ({SEQUENCES} sequences of {tokens_BT.shape[1]} tokens)"
        )
    )
    print(f"q: {type(guide).__name__}, local parameters")
    print("\n".join(f"  {name}  {' '.join(map(str, x.shape))}" for name, x in local.items()))
    print(f"Plate diagram: {svg}")
    return 0


def _parts(source: str, trust: bool) -> tuple[Any, Any]:
    if not source.endswith((".yaml", ".yml")):
        from ltm_pyro.runs.load import load_run

        trained = load_run(source, trust=trust)
        return trained.model, trained.guide
    from ltm_pyro.training.model_config import build_from_recipe, read_model_recipe

    config = read_model_recipe(source, trust)
    config.model.vocabulary = config.model.vocabulary or VOCABULARY
    built = build_from_recipe(config)
    return built.model, built.guide


def _latent(model: Any) -> dict[str, dict[str, Any]]:
    from ltm_pyro.inference.global_latents import GlobalLatent
    from ltm_pyro.inference.latent_sites import prior_sites

    shared = {
        part.name: part.prior().expand(part.loc.shape) for part in model.modules() if isinstance(part, GlobalLatent)
    }
    return {
        name: {"shape": [*fn.shape()], "prior": _family(fn), "of_each_sequence": False} for name, fn in shared.items()
    } | {
        name: {"shape": [*fn.event_shape], "prior": _family(fn), "of_each_sequence": True}
        for name, fn in prior_sites(model, 1).items()
    }


def _family(fn: Any) -> str:
    """The name of the distribution inside any `Independent`."""
    from torch.distributions import Independent

    return _family(fn.base_dist) if isinstance(fn, Independent) else type(fn).__name__


def _summary(trace: Any, local: dict[str, Any], batch: Batch) -> dict[str, Any]:
    sites = {n: x for n, x in trace.nodes.items() if x["type"] == "sample" and hasattr(x["value"], "shape")}
    return {
        "sequences": batch.size,
        "sites": {
            n: {"shape": list(x["value"].shape), "observed": x["is_observed"]}
            for n, x in sites.items()
            if n != "sequences"
        },
        "local": {name: list(x.shape) for name, x in local.items()},
    }


def _write(path: Path, text: str, force: bool) -> None:
    """Writes; refuses to replace a file in which there is anything else."""
    with writing(path, "--svg"):
        if not force and path.exists() and path.read_bytes() != text.encode():
            raise UsageError(f"{path} exists already: choose another --svg, or add --force.")
        with atomic_write(path) as new:
            new.write_text(text, "utf-8")
