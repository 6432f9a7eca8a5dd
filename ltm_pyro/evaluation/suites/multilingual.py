"""Bits per byte of texts in several languages."""

from functools import partial
from pathlib import Path

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part, no_data, score_text
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.run import Run

ESTIMATORS = ("bound", "iwae", "prior", *GAIN)


def parts(options: Options) -> list[Part]:
    """One part per file of the folder ``multilingual``; a file is named ``corpus.LANGUAGE.txt``."""
    folder = Path(options.find("multilingual", "multilingual") or options.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: the suite multilingual needs one with a file for each language.")
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith((".txt", ".jsonl")))
    if not files:
        raise no_data("multilingual", "a folder `multilingual` of .txt or .jsonl files", options)
    return [Part(file.stem.split(".")[-1], partial(bits_per_byte, str(file), options)) for file in files]


def bits_per_byte(place: str, options: Options, run: Run) -> Figures:
    """Bits per UTF-8 byte, which do not depend on the tokenizer, and the predictive gain in the same unit.

    Figures that need a bound are None if the run has none.
    """
    *_, others, bits = score_text(run, place, ESTIMATORS, options)
    bound, iwae, gain = (bits.get(name, {}) for name in ("bound", "iwae", "predictive_gain"))
    return {
        "bits_per_byte": bound.get("bits_per_byte"),
        "stderr": bound.get("stderr"),
        "iwae": iwae.get("bits_per_byte"),
        "predictive_gain": gain.get("bits_per_byte"),
        "predictive_gain_stderr": gain.get("stderr"),
        "bytes_per_token": others["bytes"] / others["tokens"],
        **others,
    }
