"""`ltm bench`: training steps, attention and generation on this machine, as one JSON file beside this one.

    python benchmarks/bench_steps.py

Writes benchmarks/results/<date>-bench-<cpu|cuda>.json. Leave the machine alone meanwhile.
"""

import json
from pathlib import Path

import torch

from ltm_pyro.studies.bench.suites import SUITES, How, bench
from ltm_pyro.utils.malloc import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # as every command does
    report = bench(SUITES, How(compiled=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(__file__).parent / "results" / f"{report['machine']['date']}-bench-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report | {"command": "python benchmarks/bench_steps.py"}, indent=1) + "\n")
    print(path)
