"""Makes the tables of figures in README.md and docs/ again: `make figures`, or `make figures ONLY="quickstart"`.

A table stands in its document between ``<!-- figures NAME -->`` and ``<!-- end of figures -->``, and NAME is a function
below, which runs a command and returns the lines. What the commands train stays in ``runs/figures`` and is used again;
``rm -r runs/figures`` starts afresh. Tables of texts that are not ours need ``DATA=FOLDER``, and are left as they are
without it.
"""

import argparse
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "figures"
QUICKSTART = RUNS / "quickstart"
MARKED = re.compile(r"(<!-- figures (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
Lines = list[str]


def command(*words: object) -> str:
    """Runs Python with these words; what it prints."""
    print("$ python", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-P", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"figures: the command ended with exit code {done.returncode}.")
    return done.stdout


def table(head: Lines, rows: list[Lines]) -> Lines:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def trained() -> dict[str, Any]:
    """The quickstart's summary, after training it if it is not there."""
    if not (QUICKSTART / "summary.json").exists():
        command("-m", "ltm_pyro.studies.quickstart", "--out", QUICKSTART)
    found: dict[str, Any] = json.loads((QUICKSTART / "summary.json").read_text("utf-8"))
    return found


def quickstart(_: Path | None) -> Lines:
    """README.md: what the quickstart prints."""
    x = trained()
    rows = [
        ("`bound`: the negative ELBO of the Latent-Thought model", "bound"),
        ("`iwae`: importance-weighted, 64 draws", "iwae"),
        ("`prior`: the same model without inference", "prior"),
        ("`reused_noise`: **not a bound**", "reused_noise"),
        ("`causal`: predicted block by block, z from the text before", "causal"),
        ("`causal_prior`: the same with z from the prior", "causal_prior"),
        ("autoregressive baseline: same trunk, window and training time", "autoregressive"),
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
    command("examples/inference_efficiency.py", QUICKSTART, "--out", out, "--limit", 32)
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
    """docs/evaluation.md: the quickstart on texts unlike its own, beside its baseline."""
    assert data is not None
    trained()
    words = ("--suite", "zero-shot,multilingual", "--suite-dir", data, "--limit", 16, "--out", RUNS / "suites")
    baseline = ("--baseline", QUICKSTART / "autoregressive")
    found = json.loads(command("-m", "ltm_pyro.cli", "evaluate", QUICKSTART, *words, *baseline, "--json"))["results"]
    lines: Lines = []
    units = (("zero-shot", "nats per token", "nats_per_token"), ("multilingual", "bits per byte", "bits_per_byte"))
    for suite, unit, figure in units:
        rows = []
        for name, row in found[suite].items():
            ours, theirs = row["model"], row["baseline"]
            if "predictive_gain" in ours:
                gain = f"{ours['predictive_gain']:.3f} ± {_error(ours['predictive_gain_stderr'])}"
                apart = row["model - baseline"]
                difference = f"{apart[figure]:+.3f} ± {_error(apart['stderr'])}" if apart else "?"
                rows.append([name, f"{ours[figure]:.3f}", gain, f"{theirs[figure]:.3f}", difference])
        head = [unit, "Latent-Thought, `bound`", "predictive gain", "autoregressive", "difference, paired"]
        lines += [*table(head, rows), ""]
    return lines[:-1]


NEED_DATA = (suites,)
TABLES: dict[str, Callable[[Path | None], Lines]] = {
    made.__name__: made for made in (quickstart, efficiency, collapse, suites)
}


def _error(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def wrapped(text: str, width: int = 120) -> Lines:
    """A paragraph in lines of at most ``width`` characters."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


def documents() -> list[Path]:
    """README.md and everything in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Makes every table, or those that are named, and writes it where it stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], help="all of them by default")
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


if __name__ == "__main__":
    main()
