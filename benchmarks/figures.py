"""Makes the tables of figures in README.md and docs/ again: `make figures`, or `make figures ONLY="quickstart"`.

A table stands in its document between ``<!-- figures NAME -->`` and ``<!-- end of figures -->``, and NAME is a function
below, which runs a command and returns the lines. What the commands train stays in ``runs/figures`` and is used again;
``rm -r runs/figures`` starts afresh. Tables of texts that are not ours need ``DATA=FOLDER``, and are left as they are
without it. Trainings and studies have budgets in steps or FLOPs, so that a busy machine changes seconds and nothing
else.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "figures"
QUICKSTART, PROSE = RUNS / "quickstart", RUNS / "prose"
PICTURES = ROOT / "docs" / "figures"
LTM = ("-m", "ltm_pyro.cli")
STORAGE = f"sqlite:///{RUNS / 'studies.db'}"
MARKED = re.compile(r"(<!-- figures (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
Lines = list[str]
TASKS, TASK_STEPS = {"permutation": 6}, 4_000  # thoughts of each task


def command(*words: object) -> str:
    """Runs Python with these words; what it prints."""
    print("$ python", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-P", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"figures: the command ended with exit code {done.returncode}.")
    return done.stdout


def corpus() -> Path:
    """The packed data of `ltm_pyro.studies.prose`: text that comes with every CPython."""
    from ltm_pyro.studies.prose import prepare

    return prepare(PROSE)


def text_of(data: Path | None, pattern: str) -> Path:
    """The first file below the folder of --data whose name fits."""
    assert data is not None
    found = next(iter(sorted(data.rglob(pattern))), None)
    return found or sys.exit(f"figures: there is no {pattern} below {data}.")


def study(source: str, name: str, trials: int, limit: int, *words: object) -> dict[str, Any]:
    """What `ltm study run` says at the end, after running the trials that are not there yet.

    Each of its ``trials`` has its figures by document as ``records``, as `documents.compare` takes them.
    """
    from ltm_pyro.evaluation.documents import read_records

    out = RUNS / "studies" / name
    given = ("--study-name", name, "--storage", STORAGE, "--out", out, "--trials", trials, "--json", *words)
    options = ("--set", f"data.directory={corpus()}", "--limit", limit, "--samples", 4)
    found: dict[str, Any] = json.loads(command(*LTM, "study", "run", source, *options, *given))
    folders = {"trial": "trial", "baseline": "check", "repeat": "check"}
    for row in found["trials"]:
        row["records"] = read_records(out / f"{folders[row['role']]}-{row['number']:04}")
    return found


def report(name: str, pictures: dict[str, str]) -> Lines:
    """What a study's report finds; its pictures are copied into the documents under other names."""
    out = RUNS / "reports" / name
    words = ("--study-name", name, "--storage", STORAGE, "--out", out, "--force", "--json")
    found: Lines = json.loads(command(*LTM, "study", "report", *words))["findings"]
    for title, file in pictures.items():
        shutil.copy(out / title, PICTURES / file)
    return found


def table(head: Lines, rows: list[Lines]) -> Lines:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def trained() -> dict[str, Any]:
    """What `ltm_pyro.studies.prose` says of its two models, after training them if they are not there."""
    if not (PROSE / "summary.json").exists():
        command("-m", "ltm_pyro.studies.prose", "--out", PROSE)
    found: dict[str, Any] = json.loads((PROSE / "summary.json").read_text("utf-8"))
    return found


def quickstart(_: Path | None) -> Lines:
    """README.md: what the quickstart prints, and its picture."""
    command("-m", "ltm_pyro.studies.quickstart", "--out", QUICKSTART)
    words = ("--config", "studies/recipes/quickstart.yaml", "--label", "kind", "--limit", 128, "--block", 64)
    places = ("--workers", 2, "--out", QUICKSTART, "--option", f"data.directory={QUICKSTART / 'data'}", "--json")
    found = json.loads(command(*LTM, "context", *words, *places))
    shutil.copy(QUICKSTART / "context.png", PICTURES / "quickstart.png")
    context, label = found["context"], found["label"]
    names = {
        "bound": "`bound`: the negative ELBO of the Latent-Thought model",
        "iwae": "`iwae`: importance-weighted, 64 draws",
        "prior_iwae": "`prior_iwae`: 64 draws from the prior, no inference",
        "causal_prior": "`causal_prior`: each block of 64 tokens predicted from those before it",
        "shuffled": "null: the thoughts of another text",
        "prior": "null: thoughts of no text, from the prior",
    }
    apart = context["difference"]
    rows = [["floor: constants in the place of thoughts", f"{context['floor']['nats_per_token']:.3f}", "", ""]]
    for name, text in names.items():
        x, r = context["ahead"][name], context["recovered"].get(name)
        share = _share(r) if r else ""
        below = f"{x['below_floor']:.3f} ± {x['stderr_below_floor']:.3f}"
        rows.append([text, f"{x['nats_per_token']:.3f}", below, share])
    below = f"{apart['nats_per_token']:.3f} ± {apart['stderr_nats_per_token']:.3f}"
    rows.append(["ceiling: full attention", f"{context['ceiling']['nats_per_token']:.3f}", below, ""])
    said = [
        f"A linear probe of the thoughts tells the kind of {label['probe']:.0%} of the held-out rows (the",
        f"most frequent kind: {label['majority']:.0%}); {len(label['classes'])} clusters, without labels, agree",
        f"with the kinds by an adjusted Rand index of {label['adjusted_rand']:.2f} (with shuffled labels:",
        f"{label['adjusted_rand_shuffled']:.2f}).",
    ]
    head = ["nats per held-out token", "", "below the floor, paired by document", "R (95 % interval)"]
    return [*table(head, rows), "", *wrapped(" ".join(said))]


def prose(_: Path | None) -> Lines:
    """docs/training-recipes.md: a model of one kind of text beside its baseline."""
    x = trained()
    rows = [
        ("`bound`: the negative ELBO of the Latent-Thought model", "bound"),
        ("`iwae`: importance-weighted, 64 draws", "iwae"),
        ("`prior`: the same model without inference", "prior"),
        ("`reused_noise`: **not a bound**", "reused_noise"),
        ("`causal`: predicted block by block, z from the text before", "causal"),
        ("`causal_prior`: the same with z from the prior", "causal_prior"),
        ("autoregressive baseline: same trunk, window and training FLOPs", "autoregressive"),
        ("unigram", "unigram"),
    ]
    gain, error = x["predictive_gain"], x["predictive_gain_stderr"]
    above = f"{x['above_autoregressive']:+.3f} ± {x['above_autoregressive_stderr']:.3f}"
    shown = table(["nats per held-out token", ""], [[text, f"{x[name]:.3f}"] for text, name in rows])
    about = f"{x['documents']:,} held-out documents, {x['tokens']:,} tokens"
    means = f"Standard errors are over documents: {x['bound_stderr']:.3f} for `bound`, and `bound` is {above} from the "
    means += "autoregressive baseline's on the same documents. The **predictive gain**, "
    means += f"`causal_prior` less `causal`, is {gain:.3f} ± {error:.3f}."
    return [f"{about}:", "", *shown, "", *wrapped(means)]


def efficiency(_: Path | None) -> Lines:
    """docs/local-inference.md: what passes through the decoder buy, with and without inference."""
    trained()
    out = RUNS / "efficiency"
    command("examples/inference_efficiency.py", PROSE, "--out", out, "--limit", 32)
    curves = json.loads((out / "inference_efficiency.json").read_text("utf-8"))
    samples = [*curves["prior_iwae"]]
    rows = []
    for name, points in curves.items():
        cells = [f"{x['nats_per_token']:.4f} ({x['passes']})" if (x := points.get(n)) else "" for n in samples]
        rows.append([f"`{name}`" if name == "prior_iwae" else name, *cells])
    errors = [x["stderr_nats_per_token"] for points in curves.values() for x in points.values()]
    about = f"Standard error by document {min(errors):.2f} to {max(errors):.2f}, mostly shared by all figures."
    return [*table(["nats per token (passes), draws:", *samples], rows), "", about]


def collapse(_: Path | None) -> Lines:
    """docs/guides.md: an encoder beside local inference."""
    printed = command("benchmarks/bench_collapse.py", "--out", RUNS / "collapse")
    rows = [
        [
            f"`{guide}`",
            f"{x['bound']:.3f} ± {x['stderr']:.3f}",
            f"{x['kl']:.3f}",
            f"{x['predictive_gain']:.4f} ± {x['predictive_gain_stderr']:.4f}",
        ]
        for guide, x in json.loads(printed.splitlines()[-1]).items()
    ]
    return table(["guide", "`bound`", "KL", "predictive gain"], rows)


def suites(data: Path | None) -> Lines:
    """docs/evaluation.md: the model of prose on texts unlike its own, beside its baseline."""
    assert data is not None
    trained()
    words = ("--suite", "zero-shot,multilingual", "--suite-dir", data, "--limit", 16, "--out", RUNS / "suites")
    baseline = ("--baseline", PROSE / "autoregressive")
    found = json.loads(command("-m", "ltm_pyro.cli", "evaluate", PROSE, *words, *baseline, "--json"))["results"]
    lines: Lines = []
    units = (("zero-shot", "nats per token", "nats_per_token"), ("multilingual", "bits per byte", "bits_per_byte"))
    for suite, unit, figure in units:
        rows = []
        for name, row in found[suite].items():
            ours, theirs = row["model"], row["baseline"]
            if "predictive_gain" in ours:
                gain, short = ours["predictive_gain"], ours["shorter_than_a_block"]
                gain = "" if gain is None else f"{gain:.3f} ± {_error(ours['predictive_gain_stderr'])}"
                gain += f" ({short} too short)" if short else ""
                apart = row["model - baseline"]
                difference = f"{apart[figure]:+.3f} ± {_error(apart['stderr'])}" if apart else "?"
                rows.append([name, f"{ours[figure]:.3f}", gain, f"{theirs[figure]:.3f}", difference])
        head = [unit, "Latent-Thought, `bound`", "predictive gain", "autoregressive", "difference, paired"]
        lines += [*table(head, rows), ""]
    return lines[:-1]


def inference_time(_: Path | None) -> Lines:
    """docs/inference-time-compute.md: more inference on the model's own held-out text."""
    return _curves("inference-time")


def inference_time_ptb(data: Path | None) -> Lines:
    """docs/inference-time-compute.md: the same on text of another kind."""
    return _curves("inference-time-ptb", "--data", text_of(data, "ptb*"))


def _curves(name: str, *words: object) -> Lines:
    trained()
    out = RUNS / name
    runs = ("--run", PROSE, "--baseline", PROSE / "autoregressive", "--out", out)
    command("benchmarks/bench_inference_time.py", *runs, *words)
    shutil.copy(out / "inference-time.png", PICTURES / f"{name}.png")
    found = json.loads((out / "inference-time.json").read_text("utf-8"))
    shown = {"T_fast": (0, 3, 5, 7), "draws": (0, 2, 4, 6), "tokens between fits": (0, 1, 2, 3)}
    rows: list[Lines] = [[], [], [], []]
    for curve, places in shown.items():
        for row, place in zip(rows, places, strict=True):
            x = found["curves"][curve][place]
            error = _error(x["stderr"]) if place else ""  # of the difference from the first
            row += [str(x["setting"]), f"{x['nats_per_token']:.3f}", error, f"{x['seconds']:.2f}"]
    head = ["T_fast", *(units := ["nats per token", "±", "s"]), "draws", *units, "tokens between fits", *units]
    about = f"The autoregressive baseline: {found['autoregressive']:.3f}. {found['sequences']} sequences of "
    return [*table(head, rows), "", f"{about}{found['documents']} document{'s' * (found['documents'] != 1)}."]


def priors(_: Path | None) -> Lines:
    """docs/priors.md: what priors find that was put there."""
    found = []
    for seed in range(4):
        picture = PICTURES / "priors.png" if seed == 0 else RUNS / "priors.png"
        found.append(json.loads(command("benchmarks/bench_priors.py", "--seed", seed, "--figure", picture)))
    names = {"the truth": "the density that they are from", "MixturePrior": "`MixturePrior`, 2 components"}
    rows = []
    for name in found[0]["mixture"]["bounds"]:
        points = [x["mixture"]["bounds"][name] for x in found]
        above = [f"{x['above']:+.2f} ± {x['above_stderr']:.2f}" for x in points]
        own = [f"{x['bound']:.2f} ± {x['stderr']:.2f}" for x in points]
        rows.append([names.get(name, f"`{name}`"), *(own if name == "the truth" else above)])
    shares = {
        "fresh sequences in the right component": [x["mixture"]["assignment_accuracy"] for x in found],
        "`SparsePrior`: of 24 useless dimensions off": [x["sparse"]["useless_off"] for x in found],
        "`SparsePrior`: of 8 useful dimensions on": [x["sparse"]["useful_on"] for x in found],
        "`SparsePrior`: median scale of the useful ones (truth: 1)": [
            sorted(x["sparse"]["scales_useful"])[4] for x in found
        ],
    }
    for name, values in shares.items():
        rows.append([name, *(f"{x:.2f}" if "scale" in name else f"{x:.0%}" for x in values)])
    return table(["seed", *map(str, range(4))], rows)


def scaling(_: Path | None) -> Lines:
    """docs/scaling.md: budgets, widths and ways of thinking, two seeds each."""
    rows = study("benchmarks/small_scaling.py", "scaling", 36, 96, "--workers", 2)["trials"]
    said = report("scaling", {"iso-flop-curves.png": "scaling-iso-flop.png"})
    at: dict[tuple[float, int, int], dict[int, list[dict[str, Any]]]] = {}  # FLOPs, K and T_fast; width
    for row in rows:
        x = row["parameters"]
        at.setdefault((x["flops"], x["thoughts"], x["steps"]), {}).setdefault(x["width"], []).append(row)
    best = {place: min(sizes.values(), key=lambda seeds: mean(_bounds(seeds))) for place, sizes in at.items()}
    lines = [
        [
            f"{flops:.0e}".replace("e+", "·10^"),
            f"K {thoughts}, T_fast {steps}" if thoughts else "autoregressive",
            str(seeds[0]["parameters"]["width"]),
            ", ".join(f"{x:.3f}" for x in _bounds(seeds)),
            above(seeds, best[flops, 0, 0]) if thoughts else "",
        ]
        for (flops, thoughts, steps), seeds in sorted(best.items())
    ]
    head = ["FLOPs", "model", "best width", "bound of each seed", "above autoregressive"]
    return [*table(head, lines), "", *(f"- {sentence}" for sentence in said)]


def inference_steps(_: Path | None) -> Lines:
    """docs/scaling.md: fast steps in training and at test time, two seeds each."""
    rows = study("benchmarks/small_inference_steps.py", "inference_steps", 10, 32, "--budget", "1e11flops")["trials"]
    report("inference_steps", {"fast-steps-in-training.png": "inference-steps-training.png"})
    at: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        at.setdefault(row["parameters"]["steps"], []).append(row)
    tested, lines = (0, 4, 16, 32), []
    for steps, seeds in sorted(at.items()):
        after = [mean(row["figures"][f"bound_at_{n}"] for row in seeds) for n in tested] if steps else []
        lines.append(
            [
                str(steps) if steps else "0, autoregressive",
                ", ".join(f"{x:.3f}" for x in _bounds(seeds)),
                above(seeds, at[0]) if steps else "",
                *(f"{x:.3f}" for x in after or ()),
                *[""] * (len(tested) - len(after)),
            ]
        )
    head = ["T_fast in training", "bound of each seed", "above autoregressive", "0 steps at test time"]
    return table([*head, *map(str, tested[1:])], lines)


def _bounds(seeds: list[dict[str, Any]]) -> list[float]:
    return [row["figures"]["bound"] for row in seeds]


def above(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """By how much some trials' bound is above others' with the same seeds, paired by document, averaged over seeds."""
    from ltm_pyro.evaluation.documents import compare

    def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        documents = zip(*(row["records"] for row in rows), strict=True)
        return [x[0] | {"bound_nats": mean(y["bound_nats"] for y in x)} for x in documents]

    found = compare(averaged(ours), averaged(theirs))
    return f"{found.value:+.3f} ± {_error(found.stderr)}"


def pruning(_: Path | None) -> Lines:
    """docs/studies.md: one study with and without giving trials up."""
    lines = []
    for name, words in {"rates": (), "rates-pruned": ("--prune",)}.items():
        recipe = ("--base-config", ROOT / "studies" / "recipes" / "scaling.yaml", "--budget", "5e10flops")
        found = study("rate_ratio", name, 12, 32, *recipe, *words)
        rows, best = found["trials"], found["recommended"]
        searched = [row for row in rows if row["role"] == "trial"]
        early = [float(row["reason"].split("%")[0].split()[-1]) / 100 for row in searched if row["state"] == "pruned"]
        complete = [row for row in searched if row["state"] == "complete"]
        (baseline,) = (row for row in rows if row["role"] == "baseline")
        leads = sorted((x["behind"], *x["interval"]) for x in best["leads"])
        lines.append(
            [
                "with `--prune`" if words else "without",
                f"{len(complete)} of {len(searched)}",
                f"{len(complete) + sum(early):.1f}",
                f"{best['mean']:.3f} ± {best['stderr']:.3f}, {best['seeds']} seeds",
                "{:+.3f} ({:+.3f} to {:+.3f})".format(*leads[0]) if leads else "",
                f"{-baseline['above_best']:+.3f} ± {_error(baseline['above_best_stderr'])}",
            ]
        )
    head = ["", "complete", "budgets spent", "recommended: bound over fresh seeds", "runner-up behind it"]
    return table([*head, "above the autoregressive baseline, one seed"], lines)


def speed(_: Path | None) -> Lines:
    """docs/speed.md: training steps on one core."""
    words = ("bench", "steps", "--settings", "tiny", "wide", "--rounds", 5, "--eager", "--threads", 1)
    found = json.loads(command(*LTM, *words, "--clock", "cpu", "--json"))
    lines = []
    for name, report in found["steps"].items():
        for method, x in report["methods"].items():
            seconds = x["seconds"]
            lines.append(
                [
                    name,
                    method,
                    f"{1000 * seconds['median']:.0f} ({1000 * seconds['q1']:.0f} to {1000 * seconds['q3']:.0f})",
                    f"{x['tokens_per_second']:,.0f}",
                    f"{x['peak_bytes'] / 2**20:,.0f}",
                ]
            )
    machine = found["machine"]
    about = f"{machine['processor']}, torch {machine['torch']}, {machine['date']}: processor time of one core."
    return [*table(["setting", "step", "ms, median (quartiles)", "tokens per second", "MiB"], lines), "", about]


def analysis(data: Path | None) -> Lines:
    """docs/analysis.md: what each command costs, and what it says of a small model."""
    texts = ("--train", text_of(data, "corpus.train*"), "--texts", text_of(data, "corpus.val*"))
    printed = command("benchmarks/bench_analysis.py", *texts, "--out", RUNS / "analysis")
    return table(["", "what it took", "what it said"], json.loads(printed.splitlines()[-1]))


def context(_: Path | None) -> Lines:
    """docs/context.md: the context recovered on tasks whose optimum is known, by the recipe for them."""
    rows = []
    for task, thoughts in TASKS.items():
        data, run = RUNS / "tasks" / task, RUNS / "tasks" / f"{task}-run"
        if not data.exists():
            command(*LTM, "data", "make", task, "--out", data, "--sequences", 9_200, "--val-fraction", 0.05)
        recipe = ("--config", "studies/recipes/in-context.yaml", "--data.directory", data, "--run", run)
        settings = ("--model.decoder.init_args.thoughts", thoughts, "--trainer.max_steps", TASK_STEPS)
        command(*LTM, "fit", *recipe, *settings, "--ckpt_path", "last")
        words = (
            "--estimators",
            "bound,iwae,shuffled,prior",
            "--samples",
            256,
            "--limit",
            256,
            "--split",
            "test",
            "--json",
        )
        found = json.loads(command(*LTM, "evaluate", run, *words))
        length = found["tokens"] / found["sequences"]
        context = found["context"]
        nats = (context["floor"], found["estimates"]["bound"], found["estimates"]["iwae"], context["ceiling"])
        shares = [_share(context["recovered"][name]) for name in ("bound", "iwae", "shuffled", "prior")]
        rows.append([task, *(f"{x['nats_per_token'] * length:.2f}" for x in nats), *shares])
    head = ["nats per sequence", "best within 3", "`bound`", "`iwae`", "optimum", "R of `bound`", "R of `iwae`"]
    return table([*head, "shuffled", "z from the prior"], rows)


NEED_DATA = (suites, inference_time_ptb, analysis)
MADE: tuple[Callable[[Path | None], Lines], ...] = (
    *(quickstart, prose, efficiency, collapse, suites, inference_time, inference_time_ptb),
    *(priors, context, scaling, inference_steps, pruning),
)
TABLES = {made.__name__: made for made in MADE}
# of documents that still have earlier tables: `make figures ONLY=NAME` prints them
LATER = {made.__name__: made for made in (speed, analysis)}


def _error(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _share(recovered: dict[str, Any]) -> str:
    """R with its interval."""
    low, high = recovered["interval"]
    return f"{recovered['share']:.2f} ({low:.2f} to {high:.2f})"


def wrapped(text: str, width: int = 120) -> Lines:
    """A paragraph in lines of at most ``width`` characters."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


def documents() -> list[Path]:
    """README.md and everything in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Makes every table, or those that are named, and writes it where it stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, *LATER, []], help="all of them by default")
    parser.add_argument("--data", type=Path, help="folder with the texts of the suites")
    args = parser.parse_args()
    for path in documents():
        text = path.read_text("utf-8")
        for name in [found.group(2) for found in MARKED.finditer(text)]:
            if args.names and name not in args.names:
                continue
            if TABLES[name] in NEED_DATA and args.data is None:
                print(f"{path.name}: {name} left as it is, because it needs --data.")
                continue
            start = time.monotonic()
            lines = "\n".join(TABLES[name](args.data)) + "\n"
            text = MARKED.sub(lambda x, n=name, new=lines: x[1] + new + x[3] if x[2] == n else x[0], text)
            path.write_text(text, "utf-8")
            print(f"{path.name}: {name}, {time.monotonic() - start:.0f} s", flush=True)
    for name in args.names:
        if name in LATER:  # a table that stands in no document yet is printed
            print(*LATER[name](args.data), sep="\n")


if __name__ == "__main__":
    main()
