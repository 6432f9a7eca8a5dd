"""What more inference buys at test time: held-out quality against seconds, with the weights unchanged.

    python benchmarks/bench_inference_time.py --run runs/prose [--baseline RUN] [--data TEXT] [--out DIR]

Three curves over sequences of which the second half is scored given the first: T_fast; draws of z under importance
weights; tokens between two inferences of q. Standard errors are of the difference from a curve's first point, sequence
by sequence and clustered by document. Without a run it says so and measures nothing.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ltm_pyro.data import load_text_or_pack
from ltm_pyro.evaluation.evaluate import held_out
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.text.scoring import Scoring, score_tokens
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.statistics import clustered_mean

Pairs = list[tuple[list[int], list[int]]]


class Point(NamedTuple):
    """One setting's time and scores."""

    setting: int
    seconds: float
    nats_B: Tensor


def split_sequences(run: Run, count: int, text: str | None = None) -> tuple[Pairs, Tensor]:
    """Whole sequences of a text, or of the run's own held-out data, cut in the middle; and the document of each.

    The first pieces of all documents come first, so that there are as many documents as there can be.
    """
    dataset, half = load_text_or_pack(text, run.tokenizer, run.length) if text else held_out(run), run.length // 2
    rows = (dataset[index] for index in range(len(dataset)))
    whole = sorted((row for row in rows if len(row.tokens_T) == run.length), key=lambda row: row.parts[0].piece or 0)
    pairs = [(tokens[:half], tokens[half:]) for row in whole[:count] if (tokens := row.tokens_T.tolist())]
    return pairs, torch.tensor([row.parts[0].number for row in whole[:count]])


def point(run: Run, pairs: Pairs, scoring: Scoring, setting: int) -> Point:
    """Nats per token of every sequence, and seconds per sequence on this machine."""
    start = time.process_time()
    scores = score_tokens(run, pairs, scoring)
    seconds = (time.process_time() - start) / len(pairs)
    return Point(setting, seconds, torch.tensor([found.nats / len(found.nats_U) for found in scores]))


def summary(curve: list[Point], documents_B: Tensor) -> list[dict[str, float]]:
    """Means over sequences, with the standard error of the difference from the curve's first point."""
    rows = []
    for setting, seconds, nats_B in curve:
        gain_B = nats_B - curve[0].nats_B
        error = clustered_mean(gain_B, documents_B).stderr
        rows.append({"setting": setting, "seconds": seconds, "nats_per_token": float(nats_B.mean()), "stderr": error})
    return rows


def curves(run: Run, pairs: Pairs) -> dict[str, list[Point]]:
    """Every curve; `causal` is the estimator that infers q again after each block of tokens."""
    half = run.length // 2
    fits = {steps: replace(run.inference, steps=steps) for steps in (0, 1, 2, 4, 8, 16, 32, 64)}
    return {
        "T_fast": [point(run, pairs, Scoring(estimator="bound", inference=fits[n]), n) for n in fits],
        "draws": [point(run, pairs, Scoring(samples=n), n) for n in (1, 2, 4, 8, 16, 32, 64)],
        "tokens between fits": [
            point(run, pairs, Scoring(estimator="causal", block=half // n), half // n) for n in (1, 2, 4, 8, 16)
        ],
    }


def plot_curves(found: dict[str, list[dict[str, float]]], baseline: float | None, file: Path) -> None:
    """Nats per token over processor seconds per sequence, one panel a curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        seconds, nats, errors = ([p[key] for p in curve] for key in ("seconds", "nats_per_token", "stderr"))
        axes.errorbar(seconds, nats, yerr=errors, marker="o", capsize=2)
        for p in curve:
            axes.annotate(
                str(p["setting"]), (p["seconds"], p["nats_per_token"]), xytext=(3, 5), textcoords="offset points"
            )
        if baseline is not None:
            axes.axhline(baseline, color="grey", linestyle=":", label="autoregressive")
            axes.legend()
        axes.set(xlabel="processor seconds per sequence", title=name, xscale="log")
        axes.minorticks_off()
        axes.set_xticks([seconds[0], seconds[-1]], [f"{seconds[0]:.2f}", f"{seconds[-1]:.2f}"])
    figure.axes[0].set_ylabel("nats per token of the second half")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, plots and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/prose"))
    parser.add_argument("--baseline", type=Path, help="an autoregressive run")
    parser.add_argument("--data", help="text to score; the run's own held-out data by default")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where the picture and the figures go")
    args = parser.parse_args()
    if not args.run.exists():
        print(f"not run: there is no run at {args.run}; `python -m ltm_pyro.studies.prose` makes one, or give --run")
        return
    torch.set_num_threads(1)
    run = load_run(args.run)
    pairs, documents_B = split_sequences(run, args.sequences, args.data)
    found = {name: summary(curve, documents_B) for name, curve in curves(run, pairs).items()}
    baseline = None
    if args.baseline:
        baseline = point(load_run(args.baseline), pairs, Scoring(samples=1), 0).nats_B.mean().item()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_curves(found, baseline, args.out / "inference-time.png")
        counts = {"sequences": len(pairs), "documents": len(documents_B.unique())}
        figures = {"curves": found, "autoregressive": baseline, **counts}
        (args.out / "inference-time.json").write_text(json.dumps(finite(figures), indent=1))
    for name, curve in found.items():
        print(f"\n{name:>20}  nats/token  ± s.e.  seconds/sequence")
        for p in curve:
            print(f"{p['setting']:>20}  {p['nats_per_token']:10.4f}  {p['stderr']:6.4f}  {p['seconds']:16.3f}")
    if baseline is not None:
        print(f"\n{'autoregressive':>20}  {baseline:10.4f}")


if __name__ == "__main__":
    main()
