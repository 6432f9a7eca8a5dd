"""The commands that users wait for, suites and posteriors, by two versions of the program in turn.

    python benchmarks/bench_waits.py --run RUN --suite-dir DATA --input TEXTS.jsonl \
        --other OTHER/.venv/bin/ltm --other-run RUN_OF_THE_OTHER --rounds 3

The other version may be of an earlier commit, whose runs have other keys: then convert the run, or train it twice. What
differs most between the figures of the two is printed in standard errors.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltm_pyro.studies.bench.clock import machine, median_interval

SUITES = "zero-shot,multilingual,reconstruction,generation"
HERE = Path(sys.executable).parent / "ltm"


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of this version")
    parser.add_argument("--suite-dir", help="the suites' data")
    parser.add_argument("--input", help="texts for `ltm posterior`; its first 200 documents are taken")
    parser.add_argument("--other", help="`ltm` of the other version")
    parser.add_argument("--other-run", help="the same run, as the other version reads it; by default --run")
    parser.add_argument("--suites", default=SUITES)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if not (given.run and given.suite_dir and given.input and given.other):
        print("not run: name --run, --suite-dir, --input and --other")
        return
    programs = {"this": (HERE, given.run), "other": (Path(given.other), given.other_run or given.run)}
    seconds: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts.jsonl")
        texts.write_text("".join(Path(given.input).read_text("utf-8").splitlines(keepends=True)[:200]), "utf-8")
        for number in range(given.rounds):
            for version, (program, run) in programs.items():
                out = Path(folder, f"{version}-{number}")
                suites = ("--suite", given.suites, "--suite-dir", given.suite_dir, "--limit", given.limit, "--out", out)
                commands = {
                    "suites": ("evaluate", run, *suites),
                    "posterior": ("posterior", run, "--input", texts, "--longer", "cut", "--out", f"{out}.nc"),
                }
                for name, command in commands.items():
                    start = time.perf_counter()
                    subprocess.run(
                        [str(program), *map(str, command)],
                        check=True,
                        capture_output=True,
                        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
                    )
                    seconds.setdefault(name, {}).setdefault(version, []).append(time.perf_counter() - start)
                results = json.loads((out / "results.json").read_text("utf-8"))["results"]
                found[version] = dict(figures(results, ""))
    both = found["this"].keys() & found["other"].keys()
    apart = {
        name: abs(found["this"][name][0] - found["other"][name][0]) / error
        for name in both
        if (error := math.hypot(found["this"][name][1], found["other"][name][1]))
    }
    times = {
        name: {**x, "other / this": median_interval([b / a for a, b in zip(x["this"], x["other"], strict=True)])}
        for name, x in seconds.items()
    }
    widest = dict(sorted(apart.items(), key=lambda item: -item[1])[:5])
    print(json.dumps({"seconds": times, "figures": len(both), "standard errors apart": widest, "machine": machine()}))


def figures(results: Any, where: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Every estimate in nats per token, with its standard error, by its place in the results."""
    if not isinstance(results, dict):
        return
    value, error = results.get("nats_per_token"), results.get("stderr_nats_per_token")
    if isinstance(value, float) and isinstance(error, float):
        yield where, (value, error)
    for name, inner in results.items():
        yield from figures(inner, f"{where}/{name}")


if __name__ == "__main__":
    main()
