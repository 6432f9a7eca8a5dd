"""What each command of the analysis costs, and what it says of a small model: the table of docs/analysis.md.

    python benchmarks/bench_analysis.py --train CORPUS.jsonl --texts HELD-OUT.jsonl [--out runs/analysis]

The texts have a label ``source``. The model trains for a number of FLOPs; a trained one in ``--out`` is used again. The
last line of the output is the rows of the table as JSON; seconds are of this machine.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ltm_pyro.analysis import Posterior
from ltm_pyro.analysis.against_reference import compare
from ltm_pyro.analysis.information import decompose
from ltm_pyro.analysis.probes import probe
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.configure import recipe_file
from ltm_pyro.studies.prose import precision


def ltm(*words: object) -> tuple[str, float]:
    """What a command prints, and its seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ltm_pyro.cli", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"`ltm {words[0]}` ended with exit code {done.returncode}.")
    return done.stdout, time.monotonic() - start


def train(corpus: Path, out: Path, flops: float) -> Path:
    """A decoder of width 64 with 2 x 2 thoughts of 8 numbers, if it is not there yet."""
    done = out / "trained"
    if not done.exists():
        if not (out / "data").exists():
            ltm("data", "pack", corpus, "--out", out / "data", "--tokenizer", "bpe:1024", "--seq-len", 256)
        sizes = ("--model.decoder.width", 64, "--model.decoder.thoughts", 2, "--model.decoder.thought_width", 8)
        budget = ("--model.max_flops", flops, "--trainer.limit_val_batches", 0, "--trainer.precision", precision())
        place = ("--data.directory", out / "data", "--run", out / "run", "--force")
        ltm("fit", "--config", recipe_file("scaling.yaml"), *sizes, *budget, *place)
        done.touch()
    return out / "run"


def main() -> None:
    """Trains, runs the commands, and prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="texts to train on")
    parser.add_argument("--texts", type=Path, required=True, help="texts to analyse")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"))
    parser.add_argument("--flops", type=float, default=1e12, help="of training")
    args = parser.parse_args()
    run = train(args.train, args.out, args.flops)
    file, ranks, chains, page = (args.out / name for name in ("q.nc", "ranks.nc", "nuts.nc", "report.html"))

    texts = ("--input", args.texts, "--longer", "cut", "--force", "--json")
    printed, posterior_s = ltm("posterior", run, *texts, "--replicas", 1, "--out", file)
    q = json.loads(printed)
    printed, calibrate_s = ltm("calibrate", run, "--out", ranks, "--force", "--json")
    calibrated = json.loads(printed)
    few = ("--limit", 2, "--method", "nuts", "--samples", 400, "--warmup", 200)
    nuts_s = ltm("posterior", run, *texts, *few, "--out", chains)[1]
    inputs = ("--run", run, "--calibration", ranks, "--reference", chains)
    report_s = ltm("report", file, *inputs, "--out", page, "--force")[1]

    posterior, trained = Posterior.load(file), load_run(run)
    apart, source = compare(posterior, Posterior.load(chains)), probe(posterior, "source")
    parts = decompose(trained.model, trained.guide, posterior)
    megabytes = {path: f"{path.stat().st_size / 1e6:.1f} MB" for path in (file, page)}
    elbo, iwae = (q[f"mean_{name}"] * q["sequences"] / q["tokens"] for name in ("elbo", "iwae"))
    coordinates = apart["scale_ratio"].size // apart.sizes["sequence"]
    scales = apart["scale_ratio"].mean(("layer", "thought", "dim")).values
    accuracies = [f"{100 * x.mean:.0f} ± {100 * x.stderr:.0f} %" for x in (source.thoughts, source.tokens)]
    rows = [
        [
            "`ltm posterior`",
            f"{posterior_s:.0f} s, {megabytes[file]}",
            f"{q['sequences']} texts, {q['tokens']:,} tokens: ELBO {elbo:.3f}, importance-weighted bound (100 draws) "
            f"{iwae:.3f} nats per token, KL {q['mean_kl']:.1f} nats per sequence",
        ],
        [
            "k-hat",
            "the same",
            f"above 0.7 for {q['pareto_k_above_0.7']} of {q['sequences']} sequences (0 if q were the posterior)",
        ],
        [
            "`ltm calibrate`",
            f"{calibrate_s:.0f} s",
            f'p = {calibrated["p_value"]:.3f} for "q is the posterior" ({calibrated["simulations"]} simulations); 90 % '
            f"intervals hold {calibrated['coverage']['0.9']:.1%} of the coordinates, those of an exact q "
            f"{calibrated['attainable']['0.9']:.1%}",
        ],
        [
            "NUTS: `ltm posterior --limit 2 --method nuts --samples 400 --warmup 200`",
            f"{nuts_s:.0f} s",
            f"{coordinates} coordinates: largest R-hat {float(apart['r_hat'].max()):.3f}, smallest effective sample "
            f"size {float(apart['ess'].min()):.0f}; scale of q over the chains' "
            f"{' and '.join(f'{x:.2f}' for x in scales)} (1 if q is the posterior); a classifier is "
            f"right about {' and '.join(f'{x:.0%}' for x in apart['c2st'].values)} of their draws (chance: 50 %)",
        ],
        [
            "labels, in the report",
            "",
            f"where a text is from: {accuracies[0]} from the thoughts, {accuracies[1]} from the bag of tokens, "
            f"{source.majority:.0%} by the largest class ({source.sequences} texts of {len(source.classes)} sources)",
        ],
        [
            "information, in the report",
            "",
            f"of {parts.average_kl:.1f} nats of KL at least {parts.mutual_information:.1f} ± "
            f"{parts.mutual_information_stderr:.1f} say which text it is ({posterior.size} sequences can show "
            f"{parts.most:.1f}{', and do' if parts.saturated else ''}), at most {parts.marginal_kl:.1f} ± "
            f"{parts.marginal_kl_stderr:.1f} are distance from the prior",
        ],
        ["`ltm report`", f"{report_s:.0f} s, {megabytes[page]}", "all of it on one page"],
    ]
    print(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
