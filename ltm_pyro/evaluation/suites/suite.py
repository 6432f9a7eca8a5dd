"""Evaluation suites: each has parts that are computed one by one, so that an interrupted evaluation can be resumed.

A part is computed for one run at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import document_scores
from ltm_pyro.evaluation.evaluate import coarse_block, evaluate_run
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.as_json import finite

Figures = dict[str, Any]  # name -> number, ready for JSON


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of all suites.

    Args:
        directory: folder with the data; each suite documents which file names it looks for.
        sources: data set name -> file or folder, used in place of files in ``directory``.
        limit: largest number of sequences, questions or texts per part.
        samples: S, draws per sequence after the fit.
        fast_steps: T_fast; by default the recipe's ``evaluation.steps``.
        seed: random seed.
        shots: worked examples before each question of GSM8K.
        attempts: answers per question of GSM8K; the most drafts, and iterations of rethinking, of reasoning.
        features: a run, or a folder with a Hugging Face model, whose hidden states are MAUVE's features.
        judge: the run that scores generated texts.
        trust: as in `load_run`, for the run and for those of ``features`` and ``judge``.
        workers: processes that score texts.
    """

    directory: Path | None = None
    sources: Mapping[str, str] | None = None
    limit: int | None = None
    samples: int = 16
    fast_steps: int | None = None
    seed: int = 0
    shots: int = 3
    attempts: int = 5
    features: str | None = None
    judge: str | None = None
    trust: bool = False
    workers: int = 1

    def find(self, name: str, *patterns: str) -> str | None:
        """The path of a data set: its source, or the first file in ``directory`` that matches the first pattern.

        Capital letters in a file's name do not matter.
        """
        if self.sources and (name in self.sources or self.directory is None):
            return self.sources.get(name)
        names = {
            path: PurePosixPath(path.relative_to(self.folder).as_posix().lower()) for path in self.folder.rglob("*")
        }
        matches = (path for pattern in patterns for path in sorted(names) if names[path].match(pattern))
        return next((str(path) for path in matches), None)

    def inference(self, run: Run) -> LocalInference:
        """The run's inference for evaluation, with ``fast_steps`` if given."""
        return run.inference if self.fast_steps is None else replace(run.inference, steps=self.fast_steps)

    @property
    def folder(self) -> Path:
        """``directory``; `UsageError` if it is not given or does not exist."""
        if self.directory is None:
            raise UsageError("The suites need data: give --suite-dir, or --source NAME=PLACE for each data set.")
        if not self.directory.is_dir():
            raise UsageError(f"The suite directory {self.directory} does not exist: give a folder with the data.")
        return self.directory


class Part(NamedTuple):
    """One row of a suite's table.

    ``paper`` has the figures that arXiv 2502.01567 prints for its own models, of other sizes and on other data.
    """

    name: str
    figures: Callable[[Run], Figures]
    paper: Mapping[str, float] = {}


class Suite(NamedTuple):
    """How to find a suite's parts, a one-line description, and which figures are the columns of its table."""

    parts: Callable[[Options], list[Part]]
    about: str
    columns: tuple[str, ...]


BY_DOCUMENT = "by_document"  # the figure that is a list, of each document's own figures with its id and labels


class TextScores(NamedTuple):
    """A run's scores on one text: figures by estimator, the predictive gain ({} if unavailable), and all others.

    ``bits`` has ``bits_per_byte`` and their ``stderr`` of every estimator, and of the predictive gain. The others are
    counts, the reasons for what is unavailable, and `BY_DOCUMENT` if the rows know their documents.
    """

    estimates: dict[str, Figures]
    predictive_gain: Figures
    others: Figures
    bits: dict[str, Figures]


def score_text(run: Run, place: str, estimators: Sequence[str], options: Options) -> TextScores:
    """Evaluates a run on a text file; an estimator that needs a bound is missing if the run has none."""
    evaluation = evaluate_run(
        run,
        place,
        estimators,
        options.samples,
        options.fast_steps,
        options.limit,
        options.seed,
        coarse_block(run),
        workers=options.workers,
    )
    found = evaluation.as_dict()
    if evaluation.documents:
        found[BY_DOCUMENT] = [document.as_dict() for document in document_scores(evaluation)]
    rows = evaluation.rows
    assert rows is not None  # of an evaluation that has just been made
    nats = {name: result.nats_B for name, result in rows.scores.items()}
    if rows.predictive_gain_B is not None:
        nats["predictive_gain"] = rows.predictive_gain_B
    rates = {name: rows.bits_per_byte(nats_B) for name, nats_B in nats.items()}
    bits = finite({name: {"bits_per_byte": x.value, "stderr": x.stderr} for name, x in rates.items()})
    return TextScores(found.pop("estimates"), found.pop("predictive_gain") or {}, others=found, bits=bits)


def no_data(suite: str, expected: str, options: Options) -> UsageError:
    """The error for a suite that has found none of its files."""
    place = options.directory or f"--source {', '.join(options.sources or ())}"
    return UsageError(f"{place} has no data for the suite {suite}: it looks for {expected}.")
