"""Bits per byte, language by language: how far do the decoder and its thoughts carry?"""

from collections.abc import Callable
from pathlib import Path

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part, none_found
from ltm_pyro.runs.run import Run

ESTIMATORS = ("bound", "iwae", "prior")


def parts(options: Options) -> list[Part]:
    """One part for each file of the folder ``multilingual``; ``corpus.LANGUAGE.txt`` is named after the language."""
    folder = Path(options.found("multilingual", "multilingual") or options.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: the suite multilingual needs one with a file for each language.")
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".txt", ".jsonl")))
    if not files:
        raise none_found("multilingual", "a folder `multilingual` of .txt or .jsonl files", options)
    return [Part(file.stem.split(".")[-1], bits_per_byte(file, options)) for file in files]


def bits_per_byte(file: Path, options: Options) -> Callable[[Run], Figures]:
    """Bits per UTF-8 byte, which no tokenizer changes; what thinking is worth, in the same unit.

    What needs a bound is None for a run that has none.
    """

    def figures(run: Run) -> Figures:
        found = evaluate_run(
            run, str(file), ESTIMATORS, options.samples, options.fast_steps, options.limit, options.seed
        ).as_dict()
        estimators, gain = found.pop("estimates"), found.pop("thinking_gain") or {}
        bits = {name: score["bits_per_byte"] for name, score in estimators.items()}
        scale = bits["prior"] / estimators["prior"]["nats_per_token"]
        stderr = estimators.get("bound", {}).get("stderr_nats_per_token")
        worth, worth_stderr = (x and x * scale for x in map(gain.get, ("nats_per_token", "stderr_nats_per_token")))
        return {
            "bits_per_byte": bits.get("bound"),
            "stderr": stderr and stderr * scale,
            "iwae": bits.get("iwae"),
            "thinking_gain": worth,
            "thinking_gain_stderr": worth_stderr,
            "bytes_per_token": found["bytes"] / found["tokens"],
            **found,
        }

    return figures
