"""`ltm evaluate RUN`: every protocol's figures for held-out text."""

import argparse
import json
from dataclasses import replace

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from ltm_pyro.contracts import UsageError
from ltm_pyro.data import load_text_or_pack
from ltm_pyro.protocols import PROTOCOLS, Evaluation, check_protocols, evaluate
from ltm_pyro.runs import Run, load_run

BATCH = 32  # sequences fitted together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm evaluate`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--data", metavar="DIR_OR_FILE", help="packed data, text or JSONL; the run's own by default")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS), metavar="A,B,…", help=f"of {', '.join(PROTOCOLS)}")
    parser.add_argument("--samples", type=int, default=16, metavar="S", help="draws per sequence after q is final")
    parser.add_argument("--fast-steps", type=int, metavar="N", help="fast steps per fit; the recipe's by default")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sequences")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Scores, then prints a table or one JSON object; returns 0."""
    protocols = args.protocols.split(",")
    check_protocols(protocols)
    evaluation = evaluate_run(
        load_run(args.run), args.data, protocols, args.samples, args.fast_steps, args.limit, args.seed
    )
    if args.json:
        print(json.dumps(evaluation.as_dict()))
    else:
        Console().print(_table(evaluation, args.run))
    return 0


def evaluate_run(
    trained: Run,
    data: str | None = None,
    protocols: list[str] | None = None,
    samples: int = 16,
    fast_steps: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """A run's evaluation on packed data, or on text packed on the fly with its tokenizer.

    Args:
        data: the run's own held-out data when not given.
        limit: only the first so many sequences.
    """
    dataset = load_text_or_pack(data or trained.data, trained.tokenizer, trained.length)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    inference = trained.inference if fast_steps is None else replace(trained.inference, steps=fast_steps)
    chosen = Subset(dataset, range(min(limit or len(dataset), len(dataset))))
    batches = DataLoader(chosen, batch_size=BATCH, collate_fn=dataset.collate)
    console = Console(stderr=True)
    shown = track(batches, "scoring", console=console, transient=True, disable=not console.is_terminal)
    return evaluate(trained.model, trained.guide, shown, inference, protocols or list(PROTOCOLS), samples, seed)


def _table(evaluation: Evaluation, title: str) -> Table:
    e = evaluation
    table = Table(
        *("protocol", "nats/token", "± s.e.", "perplexity", "bits/byte", "KL/token", "a bound?"),
        title=f"{title}: {e.sequences:,} sequences, {e.tokens:,} tokens, {e.bytes:,} bytes",
    )
    for name, s in e.protocols.items():
        figures = (s.nats_per_token, s.stderr_nats_per_token, s.perplexity, s.bits_per_byte, s.kl_nats_per_token)
        table.add_row(name, *(f"{x:.4f}" for x in figures), "yes" if s.is_bound else "no")
    return table
