"""Priors and guides side by side: every pair trained for the same time, then scored; taken up again after a kill."""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ltm_pyro.contracts import UsageError, seeded
from ltm_pyro.data import load_text_or_pack, read_manifest
from ltm_pyro.elbo import log_weights, missing_bound
from ltm_pyro.evaluation import evaluate_run
from ltm_pyro.local import fit
from ltm_pyro.reliability import TRUSTED, pareto_k
from ltm_pyro.runs import CHECKPOINT, METRICS, Run, beside, load_run
from ltm_pyro.training.fitting import train
from ltm_pyro.training.recipe import read_recipe

RESULT, SETTINGS = "result.json", "compare.json"
DRAWS, FITTED = 100, 32  # importance weights per sequence, and sequences, for k-hat
ALONE = ("GaussianPrior", "MeanField", ("--model.decoder.init_args.thoughts", "0"))  # the autoregressive twin


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and where it goes.

    Args:
        config: the recipe that every training follows.
        priors, guides: names of ours, dotted paths, or ``file.py:Name``.
        minutes: of training, for each pair and for the autoregressive twin.
        out: a directory with a run for each pair.
        samples: S, draws per sequence for the bounds.
        limit: held-out sequences that are scored; all when not given.
        options: further options of ``ltm fit``.
    """

    config: str
    priors: Sequence[str]
    guides: Sequence[str]
    minutes: float
    out: Path
    samples: int = 16
    limit: int | None = None
    options: Sequence[str] = ()

    def pairs(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(prior, guide, options), the autoregressive twin first."""
        return [ALONE, *((prior, guide, ()) for prior, guide in product(self.priors, self.guides))]

    def begin(self) -> None:
        """Notes what is compared; refuses a directory in which something else was."""
        noted = {"config": Path(self.config).read_text("utf-8"), "minutes": self.minutes, "options": [*self.options]}
        path = self.out / SETTINGS
        if path.exists() and json.loads(path.read_text("utf-8")) != noted:
            raise UsageError(
                f"{self.out} holds a comparison with another recipe, time or options: choose another --out."
            )
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(noted), "utf-8")

    def row(self, prior: str, guide: str, options: Sequence[str]) -> dict[str, Any]:
        """One pair's figures: read where they are, else measured after training, which goes on where it was."""
        name = "autoregressive" if options else f"{_short(prior)}-{_short(guide)}"
        path = self.out / name
        if (path / RESULT).exists():
            return json.loads((path / RESULT).read_text("utf-8"))
        self._train(path, prior, guide, options)
        figures = {"name": name, "prior": _short(prior), "guide": _short(guide), **_measured(path, self)}
        beside(path / RESULT).write_text(json.dumps(figures), "utf-8")
        beside(path / RESULT).replace(path / RESULT)
        return figures

    def _train(self, path: Path, prior: str, guide: str, options: Sequence[str]) -> None:
        hours, seconds = divmod(round(60 * self.minutes), 3600)
        budget = f"{hours // 24:02}:{hours % 24:02}:{seconds // 60:02}:{seconds % 60:02}"
        again = ("--ckpt_path", str(path / CHECKPOINT)) if (path / CHECKPOINT).exists() else ("--force",)
        parts = ("--model.prior", _full(prior, "models"), "--model.guide", _full(guide, "guides"))
        words = ("--config", self.config, *self.options, *parts, *options, "--run", str(path), *again)
        train(read_recipe([*words, "--trainer.max_time", budget]))


def _full(name: str, room: str) -> str:
    return name if "." in name else f"ltm_pyro.{room}.{name}"


def _short(name: str) -> str:
    return name.replace(":", ".").rsplit(".", 1)[-1]


def _measured(path: Path, comparison: Comparison) -> dict[str, Any]:
    run = load_run(path)
    reason = missing_bound(run.model, run.guide)
    wanted = ["prior"] if reason else ["bound", "iwae", "prior"]
    scores = evaluate_run(run, protocols=wanted, samples=comparison.samples, limit=comparison.limit).protocols
    nats = {name: score.nats_per_token for name, score in scores.items()}
    steps, seconds = _pace(path, run)
    return {
        "bound": nats.get("bound"),
        "iwae": nats.get("iwae"),
        "without_thinking": nats["prior"],
        "stderr": scores["bound" if "bound" in scores else "prior"].stderr_nats_per_token,
        "thinking_gain": nats["prior"] - nats["bound"] if "bound" in nats else None,
        "kl": scores["bound"].kl_nats_per_token if "bound" in scores else None,
        **({"k_hat": None, "trusted": None} if reason else _k_hat(run)),
        "seconds_per_step": seconds,
        "steps": steps,
        "no_bound": reason,
    }


def _pace(path: Path, run: Run) -> tuple[int, float]:
    with (path / METRICS).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    config = read_recipe(["--config", str(path / "config.yaml")])
    tokens = config.data.batch_size * read_manifest(run.data).seq_len
    if not rows:
        raise UsageError(f"{path} has logged no step: give more --minutes, or log more often.")
    speed = statistics.median(float(row["train/tokens_per_second"]) for row in rows)
    return int(rows[-1]["step"]) + 1, tokens / speed


def _k_hat(run: Run) -> dict[str, float | None]:
    """The median of Pareto k-hat over some held-out sequences, and the share of them below 0.7."""
    if not run.model.decoder.thought_shape.thoughts:
        return {"k_hat": None, "trusted": None}
    dataset = load_text_or_pack(run.data, run.tokenizer, run.length)
    batch = next(iter(DataLoader(dataset, batch_size=FITTED, collate_fn=dataset.collate)))
    with seeded(0), torch.no_grad():
        batch = run.model.prepare(batch)
        state, _ = fit(run.model, run.guide, batch, run.inference)
        weights = [log_weights(run.model, run.guide, batch, state.parameters, DRAWS // 20) for _ in range(20)]
        k_B = pareto_k(torch.cat(weights))
    return {"k_hat": k_B.median().item(), "trusted": (k_B < TRUSTED).double().mean().item()}
