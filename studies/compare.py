"""Priors and guides side by side: every pair trained for the same time, then scored; taken up again after a kill."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ltm_pyro.data import read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import evaluate_run, k_hat
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.training.check_model import check_model
from ltm_pyro.training.recipe import build_module, read_recipe, take_vocabulary
from ltm_pyro.training.run_directory import CHECKPOINT, METRICS, beside, read_checkpoint
from ltm_pyro.training.train import train

RESULT, SETTINGS = "result.json", "compare.json"
DRAWS, FITTED = 100, 32  # importance weights per sequence, and sequences, for k-hat
OWN = (  # what every training sets
    *("run", "force", "ckpt_path", "model.prior", "model.guide"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "model.max_flops"),
)
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

    def check(self) -> None:
        """Refuses, before the first is trained, a pair that could not be, and two of one name."""
        for key in (option[2:].split("=")[0] for option in self.options):
            if any(f"{key}.".startswith(f"{own}.") for own in OWN):
                raise UsageError(f"--option {key} would change nothing, for every training sets it: leave it out.")
        names = [_name(*pair) for pair in self.pairs()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"Two pairs are called {twice[0]}: name each prior and guide once.")
        for prior, guide, options in self.pairs():
            config = self._config(prior, guide, options)
            take_vocabulary(config)
            read_manifest(config.data.directory).split("val", config.data.directory)
            module = build_module(config)
            check_model(module.model, module.guide)

    def open_folder(self) -> None:
        """Notes what is compared; refuses a directory in which something else was."""
        noted = {
            "config": Path(self.config).read_text("utf-8"),
            "pack": read_manifest(self._config(*ALONE).data.directory).digest,
            **{name: getattr(self, name) for name in ("minutes", "samples", "limit")},
            "options": [*self.options],
        }
        path = self.out / SETTINGS
        try:
            if path.exists() and json.loads(path.read_text("utf-8")) != noted:
                raise UsageError(
                    f"{self.out} holds a comparison with another recipe, data, time, samples, limit or options: choose "
                    f"another --out."
                )
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(noted, ensure_ascii=False), "utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.out} cannot hold a comparison ({error}): choose another --out.") from None

    def row(self, prior: str, guide: str, options: Sequence[str]) -> dict[str, Any]:
        """One pair's figures: read where they are, else measured after training, which goes on where it was."""
        name = _name(prior, guide, options)
        path = self.out / name
        asked = {"prior": _full(prior, "models"), "guide": _full(guide, "guides")}
        if (path / RESULT).exists():
            found: dict[str, Any] = json.loads((path / RESULT).read_text("utf-8"))
            if found["asked"] != asked:
                there = " with ".join(found["asked"].values())
                raise UsageError(f"{path} holds the figures of {there}: choose another --out.")
            return found
        self._train(path, prior, guide, options)
        parts = {"name": name, "prior": _short(prior), "guide": _short(guide), "asked": asked}
        figures = parts | {k: None if _odd(v) else v for k, v in _measured(path, self).items()}
        beside(path / RESULT).write_text(json.dumps(figures, ensure_ascii=False), "utf-8")
        beside(path / RESULT).replace(path / RESULT)
        return figures

    def _train(self, path: Path, prior: str, guide: str, options: Sequence[str]) -> None:
        again = ("--ckpt_path", str(path / CHECKPOINT)) if (path / CHECKPOINT).exists() else ("--force",)
        train(self._config(prior, guide, (*options, "--run", str(path), *again)))

    def _config(self, prior: str, guide: str, options: Sequence[str]) -> Namespace:
        """A pair's recipe; time is its only end."""
        hours, seconds = divmod(round(60 * self.minutes), 3600)
        budget = f"{hours // 24:02}:{hours % 24:02}:{seconds // 60:02}:{seconds % 60:02}"
        ends = ("--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--model.max_flops=null")
        parts = ("--model.prior", _full(prior, "models"), "--model.guide", _full(guide, "guides"))
        words = ("--config", self.config, *self.options, *parts, *options)
        return read_recipe([*words, *ends, "--trainer.max_time", budget])


def _odd(value: Any) -> bool:
    """Whether JSON has no such number."""
    return isinstance(value, float) and not math.isfinite(value)


def _name(prior: str, guide: str, options: Sequence[str]) -> str:
    return "autoregressive" if options else f"{_short(prior)}-{_short(guide)}"


def _full(name: str, room: str) -> str:
    return name if "." in name else f"ltm_pyro.{room}.{name}"


def _short(name: str) -> str:
    return name.replace(":", ".").rsplit(".", 1)[-1]


def _measured(path: Path, comparison: Comparison) -> dict[str, Any]:
    run = load_run(path)
    reason = missing_bound(run.model, run.guide)
    wanted = ["prior"] if reason else ["bound", "iwae", "prior"]
    found = evaluate_run(run, estimators=wanted, samples=comparison.samples, limit=comparison.limit)
    scores, gain = found.estimates, found.thinking_gain
    nats = {name: score.nats_per_token for name, score in scores.items()}
    steps, seconds = _pace(path, run)
    return {
        "bound": nats.get("bound"),
        "iwae": nats.get("iwae"),
        "without_thinking": nats["prior"],
        "stderr": scores["bound" if "bound" in scores else "prior"].stderr_nats_per_token,
        "thinking_gain": gain and gain.nats_per_token,
        "thinking_gain_stderr": gain and gain.stderr_nats_per_token,
        "kl": scores["bound"].kl_nats_per_token if "bound" in scores else None,
        **({"k_hat": None, "trusted": None} if reason else _k_hat(run)),
        "sequences": found.sequences,
        "tokens": found.tokens,
        "seconds_per_step": seconds,
        "steps": steps,
        "no_bound": reason,
    }


def _pace(path: Path, run: Run) -> tuple[int, float]:
    with (path / METRICS).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    if not rows:
        raise UsageError(f"{path} has logged no step: give more --minutes, or log more often.")
    config = read_recipe(["--config", str(path / "config.yaml")])
    batches = config.data.batch_size * config.trainer.accumulate_grad_batches
    speed = statistics.median(float(row["train/tokens_per_second"]) for row in rows)
    return read_checkpoint(path)["global_step"], batches * read_manifest(run.data).seq_len / speed


def _k_hat(run: Run) -> dict[str, float | None]:
    """The median of Pareto k-hat over some held-out sequences, and the share of them below 0.7."""
    if not run.model.decoder.thought_shape.thoughts:
        return {"k_hat": None, "trusted": None}
    k_B = k_hat(run, FITTED, DRAWS)
    return {"k_hat": k_B.median().item(), "trusted": (k_B < TRUSTED).double().mean().item()}
