"""The context recovered from one recipe: a floor, a ceiling and a Latent-Thought model, each for some seeds.

The two references are what a model would be if its thoughts could carry nothing, or all. They are trained as any
recipe is, with the settings of `floor` and `ceiling`, and have no latent variable: their figures are exact. `ltm
context` makes a `ContextStudy`, checks it, and asks for its result; what is there already is not made again.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace

from ltm_pyro.data import PackedDataset, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.context import NULLS, Context, context_recovered
from ltm_pyro.evaluation.documents import Records, document_scores
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.inference.scores import Evaluation
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.configure import Values, as_options, keep_settings, resume_options
from ltm_pyro.training.check_model import check_model
from ltm_pyro.training.model_config import build_from_recipe
from ltm_pyro.training.recipe import check_data, read_recipe
from ltm_pyro.training.train import train
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write
from ltm_pyro.utils.malloc import keep_freed_memory
from ltm_pyro.utils.processes import end_with_parent

DECODER = "model.decoder.init_args."
RESULT, SETTINGS = "context.json", "context-settings.json"
EVERY = 30.0  # seconds between two reports of what runs beside
PATIENCE = 10.0  # seconds that a run has to end, after it was told to
BOUNDS, PREDICTION = ("bound", "iwae", "prior_iwae"), "causal_prior"
ESTIMATORS = {  # by kind of run: the references have no thoughts, so that each of their figures is exact
    "floor": ("bound", PREDICTION),
    "ceiling": ("bound", PREDICTION),
    "thoughts": (*BOUNDS, PREDICTION, *NULLS),
}


def floor(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of the same network with learned constants in the place of thoughts.

    Constants with rotary positions tell a token where it is, and cross-attention has parameters: a decoder without both
    would be too low a floor.

    Args:
        decoder: the ``init_args`` of the Latent-Thought model's decoder.
    """
    return {**ar_baseline(), "model.keep_local": None, f"{DECODER}constant_thoughts": decoder["thoughts"]}


def ceiling(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of the floor with full attention: it sees all that thoughts could carry."""
    return {**floor(decoder), f"{DECODER}window": decoder["length"]}


class Scored(NamedTuple):
    """A run's figures: of every document, and of every block of tokens.

    ``block_nats`` and ``block_tokens`` are sums over all sequences of `causal_prior`, whose first block has nothing
    before it.
    """

    records: Records
    block_nats: list[float]
    block_tokens: list[int]


class Result(NamedTuple):
    """R, the nats per token of each kind of run by position, averaged over seeds, and the first model with thoughts."""

    context: Context
    by_position: dict[str, list[float]]
    run: Run


@dataclass(frozen=True, kw_only=True)
class ContextStudy:
    """Which runs are compared, and where they are.

    Args:
        config: the recipe of the Latent-Thought model.
        out: a folder with a run for each kind and seed.
        seeds: how many of each, from 0 on.
        samples: S, draws per sequence.
        block: tokens of a prediction's block.
        split: that is scored.
        limit: sequences that are scored; all when not given.
        label: of the documents, that no model is told.
        options: further options of ``ltm fit``.
        trust: lets the recipe of a run or of an export name code of others.
    """

    config: str
    out: Path
    seeds: int = 1
    samples: int = 64
    block: int = 16
    split: str = "val"
    limit: int | None = None
    label: str | None = None
    options: Sequence[str] = ()
    trust: bool = False

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(kind, seed) of every run; those that take longest come first."""
        return [(kind, seed) for seed in range(self.seeds) for kind in reversed(ESTIMATORS)]

    def folder(self, kind: str, seed: int) -> Path:
        """Where a run is."""
        return self.out / f"{kind}-{seed}"

    def check(self) -> None:
        """Refuses, before the first is trained, what could not be trained, and a folder of another study."""
        for key in (option[2:].split("=")[0] for option in self.options):
            if key in ("run", "force", "ckpt_path", "seed_everything"):
                raise UsageError(f"--option {key} would change nothing, because every training sets it: leave it out.")
        config = self._configure("thoughts", 0)
        if not config.model.decoder.init_args.get("thoughts"):
            raise UsageError(f"{self.config} has no thoughts: the context recovered is what thoughts carry.")
        for kind in ESTIMATORS:
            config = self._configure(kind, 0)
            check_data(config)
            built = build_from_recipe(config)
            check_model(built.model, built.guide)
        manifest = read_manifest(config.data.directory)
        manifest.split(self.split, config.data.directory)
        manifest.need_documents(config.data.directory, "R with its error over documents")
        if self.label is not None and self.label not in manifest.labels:
            has = f"has the labels {', '.join(manifest.labels)}" if manifest.labels else "has none"
            raise UsageError(
                f"There is no label {self.label!r}, because {config.data.directory} {has}: pack the text with --label."
            )
        if self.label is not None:
            rows = islice(PackedDataset.open(config.data.directory, self.split), self.limit)
            if len(values := {row.parts[0].document.labels.get(self.label) for row in rows} - {None}) < 2:
                known = ", ".join(map(str, values)) or "none"
                raise UsageError(
                    f"The label {self.label} of the sequences that are scored is {known}, so that nothing tells them "
                    f"apart: score more of them, or leave --label out."
                )
        settings: dict[str, Any] = {"config": Path(self.config).read_text("utf-8"), "pack": manifest.digest}
        settings |= {name: getattr(self, name) for name in ("samples", "block", "split", "limit")}
        settings["options"] = [*self.options]
        others = "with another recipe, data or settings"
        keep_settings(self.out / SETTINGS, settings, "a study of the context", others)

    def score(self, kind: str, seed: int) -> Scored:
        """One run's figures: read if they are there, else measured after a training, which resumes if it was begun."""
        path = self.folder(kind, seed)
        result = path / RESULT
        if result.exists():
            return Scored(**json.loads(result.read_text("utf-8")))
        train(self._configure(kind, seed, "--run", str(path), *resume_options(path)))
        scored = self._evaluate(load_run(path, trust=self.trust), kind)
        with atomic_write(result) as new:
            new.write_text(json.dumps(finite(scored._asdict()), ensure_ascii=False), "utf-8")
        return scored

    def score_beside(self, workers: int, tell: Callable[[str], None]) -> dict[tuple[str, int], Scored]:
        """`score` of all `runs`, ``workers`` at a time in processes of their own, which write to ``KIND-SEED.log``."""
        self.out.mkdir(parents=True, exist_ok=True)
        threads, spawn = max(1, torch.get_num_threads() // workers), multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool:
            logs = {run: self.out / f"{run[0]}-{run[1]}.log" for run in self.runs}
            waiting = {pool.submit(_score_alone, self, *run, threads, logs[run]): run for run in self.runs}
            scored: dict[tuple[str, int], Scored] = {}
            try:
                while waiting:
                    ended, _ = wait(waiting, timeout=EVERY, return_when=FIRST_COMPLETED)
                    for future in ended:
                        run = waiting.pop(future)
                        scored[run] = future.result()
                        tell(f"{len(scored)} of {len(self.runs)}: {run[0]}, seed {run[1]}: done")
                    for future, run in waiting.items():
                        if not ended and future.running() and (line := _last_line(logs[run])):
                            tell(f"{run[0]}, seed {run[1]}: {line}")
            except BaseException as error:
                pool.shutdown(cancel_futures=True, wait=False)
                children = multiprocessing.active_children()
                until = time.monotonic() + PATIENCE
                for child in children:  # Ctrl-C has told them too, and a second signal would not let a step be saved
                    child.join(max(0.0, until - time.monotonic()))
                for child in children:
                    child.terminate()
                for child in children:
                    child.join(PATIENCE)
                    child.kill()
                if isinstance(error, BrokenProcessPool):
                    raise UsageError(
                        f"A training under {self.out} was killed, perhaps because memory was short: give fewer "
                        f"--workers, and the same command again."
                    ) from None
                raise
        return scored

    def result(self, scored: Mapping[tuple[str, int], Scored]) -> Result:
        """R between all floors and all ceilings, of what `score` has found for each of the `runs`."""
        found = {kind: [scored[kind, seed] for seed in range(self.seeds)] for kind in ESTIMATORS}
        records = {kind: [x.records for x in runs] for kind, runs in found.items()}
        estimators = ESTIMATORS["thoughts"]
        context = context_recovered(records["thoughts"], records["floor"], records["ceiling"], estimators)
        nats = {kind: np.sum([x.block_nats for x in runs], 0) for kind, runs in found.items()}
        tokens = {kind: np.sum([x.block_tokens for x in runs], 0) for kind, runs in found.items()}
        by_position = {kind: (nats[kind] / tokens[kind]).tolist() for kind in found}
        return Result(context, by_position, load_run(self.folder("thoughts", 0), trust=self.trust))

    def _configure(self, kind: str, seed: int, *options: str) -> Namespace:
        trust = ["--trust"] if self.trust else []
        given = ["--config", self.config, *self.options, "--seed_everything", str(seed), *trust]
        changes: Values = {}
        if kind != "thoughts":
            decoder = read_recipe(given).model.decoder.init_args.as_dict()
            changes = floor(decoder) if kind == "floor" else ceiling(decoder)
        return read_recipe([*given, *as_options(changes), *options])

    def _evaluate(self, run: Run, kind: str) -> Scored:
        samples = self.samples if kind == "thoughts" else 1
        settings: dict[str, Any] = {"split": self.split, "limit": self.limit, "block": self.block}
        found = evaluate_run(run, estimators=ESTIMATORS[kind], samples=samples, **settings)
        nats, tokens = by_block(found, self.block)
        return Scored([x.as_dict() for x in document_scores(found)], nats, tokens)


def _score_alone(study: ContextStudy, kind: str, seed: int, threads: int, log: Path) -> Scored:
    keep_freed_memory()
    torch.set_num_threads(threads)
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return study.score(kind, seed)
        except KeyboardInterrupt:
            os._exit(130)  # its step is saved; otherwise this process would wait for another run


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip(" │─└┘┴")), "")


def by_block(found: Evaluation, block: int) -> tuple[list[float], list[int]]:
    """The nats and the tokens of each block, summed over all sequences, by `causal_prior`."""
    assert found.rows is not None
    log_weights_SJB = found.rows.scores[PREDICTION].log_weights_SJB
    assert log_weights_SJB is not None
    nats_JB = np.log(len(log_weights_SJB)) - log_weights_SJB.logsumexp(0)
    first_J1 = torch.arange(len(nats_JB))[:, None] * block
    tokens_JB = (found.rows.tokens_B - first_J1).clamp(0, block)
    return nats_JB.sum(1).tolist(), tokens_JB.sum(1).int().tolist()
