"""Priors and guides side by side: every pair trained for the same budget, then scored; resumed where interrupted.

`ltm compare` makes a `Comparison`, checks it, writes its settings, and asks for the figures of each pair.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from ltm_pyro.data import read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.context import context_recovered
from ltm_pyro.evaluation.documents import compare, document_scores, read_records, write_records
from ltm_pyro.evaluation.evaluate import coarse_block, evaluate_run, k_hat
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.ar_baseline import PARTS, ar_baseline
from ltm_pyro.studies.budget import Budget, check_dearest_step, parse_budget
from ltm_pyro.studies.configure import Values, as_options, keep_settings, resume_options
from ltm_pyro.studies.context import ceiling, floor
from ltm_pyro.training.check_model import check_model
from ltm_pyro.training.cost_summary import tokens_per_step
from ltm_pyro.training.model_config import build_from_recipe
from ltm_pyro.training.recipe import build_module, check_data, read_recipe
from ltm_pyro.training.run_directory import METRICS, read_checkpoint
from ltm_pyro.training.train import train
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write

__all__ = ["Budget", "Comparison", "parse_budget"]
RESULT, SETTINGS = "result.json", "compare.json"
K_HAT_SEQUENCES, K_HAT_DRAWS = 32, 100


class Pair(NamedTuple):
    """A prior and a guide that are trained together: names of ours, dotted paths, or ``file.py:Name``."""

    prior: str
    guide: str
    reference: str = ""  # autoregressive, floor or ceiling, all without a latent variable

    @property
    def name(self) -> str:
        """That of its run's folder."""
        return self.reference or f"{_short(self.prior)}-{_short(self.guide)}"

    @property
    def full_names(self) -> dict[str, str]:
        """The prior's and the guide's, ours by dotted path."""
        named = {"prior": (self.prior, "models"), "guide": (self.guide, "guides")}
        return {part: name if "." in name else f"ltm_pyro.{room}.{name}" for part, (name, room) in named.items()}

    @property
    def settings(self) -> Values:
        """What the pair changes in the recipe; `Comparison` knows of a floor or a ceiling what it depends on."""
        if self.reference:
            return ar_baseline()
        return {f"model.{part}": name for part, name in self.full_names.items()}


AR_BASELINE, FLOOR, CEILING = (
    Pair(PARTS["model.prior"], PARTS["model.guide"], reference) for reference in ("autoregressive", "floor", "ceiling")
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and where it goes.

    Args:
        config: the recipe that every training follows.
        priors, guides: names of ours, dotted paths, or ``file.py:Name``.
        budget: of training, for each pair and for the autoregressive baseline.
        out: a directory with a run for each pair.
        samples: S, draws per sequence for the bounds.
        limit: held-out sequences that are scored; all when not given.
        options: further options of ``ltm fit``.
        trust: lets the recipe of a run or of an export name code of others.
        context: whether R of every pair is given, between a floor and a ceiling that are trained beside them.
    """

    config: str
    priors: Sequence[str]
    guides: Sequence[str]
    budget: Budget
    out: Path
    samples: int = 16
    limit: int | None = None
    options: Sequence[str] = ()
    trust: bool = False
    context: bool = False

    @property
    def pairs(self) -> list[Pair]:
        """Every prior with every guide, behind the autoregressive baseline and the references of R."""
        references = [FLOOR, CEILING] if self.context else []
        return [AR_BASELINE, *references, *(Pair(prior, guide) for prior, guide in product(self.priors, self.guides))]

    def check(self) -> None:
        """Refuses, before the first is trained, a pair that could not be, and two of one name."""
        own = ("run", "force", "ckpt_path", "model.prior", "model.guide", *self.budget.settings)
        for key in (option[2:].split("=")[0] for option in self.options):
            if any(f"{key}.".startswith(f"{setting}.") for setting in own):
                raise UsageError(f"--option {key} would change nothing, because every training sets it: leave it out.")
        names = [pair.name for pair in self.pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"Two pairs are called {twice[0]}: name each prior and guide once.")
        for pair in self.pairs:
            config = self._configure(pair)
            check_data(config)
            read_manifest(config.data.directory).split("val", config.data.directory)
            built = build_from_recipe(config)
            check_model(built.model, built.guide)
            if self.budget.unit == "flops":
                check_dearest_step(build_module(config), config)

    def write_settings(self) -> None:
        """Writes what is compared into the directory; refuses one in which something else was compared."""
        settings = {
            "config": Path(self.config).read_text("utf-8"),
            "pack": read_manifest(self._configure(AR_BASELINE).data.directory).digest,
            **({"minutes": self.budget.amount / 60} if self.budget.unit == "s" else {"budget": str(self.budget)}),
            **{name: getattr(self, name) for name in ("samples", "limit")},
            "options": [*self.options],
        }
        others = "with another recipe, data, budget, samples, limit or options"
        keep_settings(self.out / SETTINGS, settings, "a comparison", others)

    def figures(self, pair: Pair) -> dict[str, Any]:
        """One pair's figures: read if they are there, else measured after a training, which resumes if it was begun.

        A figure is None if the pair does not have it, or if it is not finite, which JSON cannot write.
        """
        run, asked = self.out / pair.name, pair.full_names
        result = run / RESULT
        if result.exists():
            stored: dict[str, Any] = json.loads(result.read_text("utf-8"))
            if stored["asked"] != asked:
                there = " with ".join(stored["asked"].values())
                raise UsageError(f"{run} holds the figures of {there}: choose another --out.")
            return stored
        train(self._configure(pair, "--run", str(run), *resume_options(run)))
        scored, documents = self._score(load_run(run))
        measured = scored | _pace(run)
        figures = {
            **{"name": pair.name, "prior": _short(pair.prior), "guide": _short(pair.guide), "asked": asked},
            **finite(measured),
        }
        write_records(run, documents)
        with atomic_write(result) as temp_path:
            temp_path.write_text(json.dumps(figures, ensure_ascii=False), "utf-8")
        return figures

    def difference(self, pair: Pair) -> dict[str, float | None]:
        """By how much a pair's bound is above the autoregressive baseline's, paired by document, and its error.

        None where one of them has no bound, or rows do not know their documents.
        """
        first, second = (read_records(self.out / x.name) for x in (pair, self.pairs[0]))
        if pair == AR_BASELINE or not first or not second or "bound_nats" not in first[0]:
            return {"difference": None, "difference_stderr": None}
        found = compare(first, second)
        return finite({"difference": found.value, "difference_stderr": found.stderr})

    def recovered(self, pair: Pair) -> dict[str, Any]:
        """R of a pair's bound and its 95 % interval (see `Context`); None where it is not asked for or not defined."""
        nothing = {"context_recovered": None, "context_recovered_interval": None}
        model, floor, ceiling = (read_records(self.out / x.name) for x in (pair, FLOOR, CEILING))
        if not self.context or pair.reference or not all((model, floor, ceiling)) or "bound_nats" not in model[0]:
            return nothing
        found = context_recovered([model], [floor], [ceiling], ["bound"]).recovered
        if not found:
            return nothing
        return {"context_recovered": found["bound"].share, "context_recovered_interval": [*found["bound"].interval]}

    def _configure(self, pair: Pair, *options: str) -> Namespace:
        """A pair's recipe, which ends when the budget is spent and for no other reason."""
        settings, trust = pair.settings, ["--trust"] if self.trust else []
        if pair in (FLOOR, CEILING):
            base = read_recipe(["--config", self.config, *self.options, *trust]).model.decoder.init_args.as_dict()
            settings = floor(base) if pair == FLOOR else ceiling(base)
        changes = as_options(settings | self.budget.settings)
        return read_recipe(["--config", self.config, *self.options, *changes, *options, *trust])

    def _score(self, run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The bounds on held-out sequences (nats per token), the predictive gain, and Pareto k-hat.

        Without a bound there is the score under thoughts from the prior only; without thoughts there is no k-hat. Also
        the figures of each document, if the rows know them.
        """
        no_bound = missing_bound(run.model, run.guide)
        estimators = ["prior", *GAIN] if no_bound else ["bound", "iwae", "prior", *GAIN]
        found = evaluate_run(
            run, estimators=estimators, samples=self.samples, limit=self.limit, block=coarse_block(run)
        )
        prior, bound, iwae = (found.estimates.get(name) for name in ("prior", "bound", "iwae"))
        assert prior is not None
        gain, k_B = found.predictive_gain, None
        if found.no_bound:
            no_bound, bound, iwae = found.no_bound, None, None
        if not no_bound and run.model.decoder.thought_shape.thoughts:
            k_B = k_hat(run, K_HAT_SEQUENCES, K_HAT_DRAWS)
        documents = [x.as_dict() for x in document_scores(found)] if found.documents else []
        figures = {
            "bound": bound and bound.nats_per_token,
            "iwae": iwae and iwae.nats_per_token,
            "without_thinking": prior.nats_per_token,
            "stderr": (bound or prior).stderr_nats_per_token,
            "predictive_gain": gain and gain.nats_per_token,
            "predictive_gain_stderr": gain and gain.stderr_nats_per_token,
            "shorter_than_a_block": found.shorter_than_a_block,
            "kl": bound and bound.kl_nats_per_token,
            "k_hat": None if k_B is None else k_B.median().item(),
            "trusted": None if k_B is None else (k_B < TRUSTED).double().mean().item(),  # share of the sequences
            "sequences": found.sequences,
            "tokens": found.tokens,
            "no_bound": no_bound,
        }
        return figures, documents


def _pace(run: Path) -> dict[str, Any]:
    """The steps of a training, and their median seconds."""
    with (run / METRICS).open(newline="") as file:
        speeds = [float(speed) for row in csv.DictReader(file) if (speed := row["train/tokens_per_second"])]
    if not speeds:
        raise UsageError(f"{run} has logged no step: give a larger budget, or log more often.")
    config, checkpoint = read_recipe(["--config", str(run / "config.yaml")]), read_checkpoint(run)
    return {
        "seconds_per_step": tokens_per_step(config) / statistics.median(speeds),
        "steps": checkpoint["global_step"],
        "flops": checkpoint["state_dict"]["flops"].item(),
    }


def _short(name: str) -> str:
    """The class of a dotted path or ``file.py:Name``."""
    return name.replace(":", ".").rsplit(".", 1)[-1]
