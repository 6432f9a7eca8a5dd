"""What thinking for longer buys at test time: held-out quality against seconds, without touching the weights.

    python benchmarks/bench_inference_time.py --run runs/quickstart [--baseline RUN] [--sequences 32] [--out DIR]

Three curves over beginnings of a run's own held-out sequences, of which the second half is scored given the first:
T_fast; draws of z under importance weights; tokens between two fits. Without a run it says so and measures nothing.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from ltm_pyro.evaluation import held_out
from ltm_pyro.runs import Run, load_run
from ltm_pyro.text.scoring import Scoring, score_tokens

Pairs = list[tuple[list[int], list[int]]]


def continuations(run: Run, count: int) -> Pairs:
    """Whole held-out sequences, cut in the middle."""
    dataset, pairs = held_out(run), []
    for index in range(len(dataset)):
        row = dataset[index]
        if row.length == run.length and len(pairs) < count:
            tokens = [int(token) for token in row.tokens_T]
            pairs.append((tokens[: run.length // 2], tokens[run.length // 2 :]))
    return pairs


def point(run: Run, pairs: Pairs, scoring: Scoring, **setting: int) -> dict[str, float]:
    """Nats per token with its standard error over sequences, and seconds per sequence on this machine."""
    began = time.process_time()
    scores = score_tokens(run, pairs, scoring)
    seconds = (time.process_time() - began) / len(pairs)
    rates = torch.tensor([found.nats / len(found.nats_U) for found in scores])
    error = float(rates.std() / math.sqrt(len(rates)))
    return {**setting, "nats_per_token": float(rates.mean()), "stderr": error, "seconds": seconds}


def curves(run: Run, pairs: Pairs) -> dict[str, list[dict[str, float]]]:
    """Every curve; causal is the protocol that fits again."""
    half = run.length // 2
    fast = [
        (steps, Scoring(protocol="bound", inference=replace(run.inference, steps=steps)))
        for steps in (0, 1, 2, 4, 8, 16, 32, 64)
    ]
    return {
        "T_fast": [point(run, pairs, scoring, setting=steps) for steps, scoring in fast],
        "draws": [point(run, pairs, Scoring(samples=n), setting=n) for n in (1, 2, 4, 8, 16, 32, 64)],
        "tokens between fits": [
            point(run, pairs, Scoring(protocol="causal", block=block), setting=block)
            for block in (half, half // 2, half // 4, half // 8, half // 16)
        ],
    }


def draw(found: dict[str, list[dict[str, float]]], baseline: float | None, file: Path) -> None:
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
    figure.axes[0].set_ylabel("nats per token of the second half")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--baseline", type=Path, help="an autoregressive run")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where the picture and the figures go")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.run.exists():
        print(f"There is no run at {args.run}: `make quickstart` makes one, or give --run.")
        return
    torch.set_num_threads(1)
    run = load_run(args.run)
    pairs = continuations(run, args.sequences)
    found = curves(run, pairs)
    twin = point(load_run(args.baseline), pairs, Scoring(samples=1), setting=0) if args.baseline else None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(found, twin and twin["nats_per_token"], args.out / "inference-time.png")
        (args.out / "inference-time.json").write_text(
            json.dumps({"curves": found, "autoregressive": twin}, indent=2) + "\n"
        )
    if args.json:
        print(json.dumps({"sequences": len(pairs), "curves": found, "autoregressive": twin}))
        return
    for name, curve in found.items():
        print(f"\n{name:>20}  nats/token  ± s.e.  seconds/sequence")
        for p in curve:
            print(f"{p['setting']:>20}  {p['nats_per_token']:10.4f}  {p['stderr']:6.4f}  {p['seconds']:16.3f}")
    if twin:
        print(
            f"\n{'autoregressive':>20}  {twin['nats_per_token']:10.4f}  {twin['stderr']:6.4f}  {twin['seconds']:16.3f}"
        )


if __name__ == "__main__":
    main()
