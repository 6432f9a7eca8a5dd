"""A Latent-Thought model beside what it has to be weighed against: same trunk, same data, equal care.

`ltm baselines` makes `Baselines`, checks it, and asks for its stages; each is resumed where it was interrupted.
Shapes: S draws.
"""

import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ltm_pyro.data import read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import Records, compare, document_scores, read_records, write_records
from ltm_pyro.evaluation.evaluate import evaluate_run, record_test_use
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.ar_baseline import PARTS, ar_baseline
from ltm_pyro.studies.budget import Budget
from ltm_pyro.studies.configure import Values, as_options, keep_settings
from ltm_pyro.training.check_model import check_model
from ltm_pyro.training.cost_summary import tokens_per_step
from ltm_pyro.training.flops import flops_per_token
from ltm_pyro.training.model_config import BuiltModel, build_from_recipe
from ltm_pyro.training.recipe import check_budget, check_data, read_recipe
from ltm_pyro.training.run_directory import CHECKPOINT, METRICS, read_checkpoint
from ltm_pyro.training.train import train
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write

DECODER = "model.decoder.init_args."
TRUNK = ("layers", "width", "heads", "kv_heads", "length", "recompute")  # what the denoiser shares with the decoder
LTM = "latent-thought"
RESULT, SETTINGS, TRAINED = "result.json", "baselines.json", "trained"
PACE = 8  # steps from which the duration is estimated
PATIENCE = 3  # validations without a better figure, after which a training ends


def ar_full(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of the autoregressive model whose window is its length: it sees all tokens before.

    Args:
        decoder: the ``init_args`` of the Latent-Thought model's decoder.
    """
    return {**ar_baseline(), f"{DECODER}window": decoder["length"]}


def masked_diffusion(decoder: Mapping[str, Any]) -> Values:
    """Recipe settings of masked diffusion with the decoder's trunk, full attention and no causal mask.

    Args:
        decoder: the ``init_args`` of the Latent-Thought model's decoder.
    """
    trunk = {name: decoder[name] for name in TRUNK if decoder.get(name) is not None}
    return {
        **PARTS,
        "model.decoder": {"class_path": "ltm_pyro.models.Denoiser", "init_args": trunk},
        "model.joint": "ltm_pyro.models.MaskedDiffusionModel",
        "model.guide": "ltm_pyro.guides.Masking",
        "model.keep_local": None,
    }


MODELS: dict[str, Callable[[Mapping[str, Any]], Values]] = {  # name -> what it changes in the recipe
    LTM: lambda decoder: {},
    "autoregressive": lambda decoder: ar_baseline(),
    "autoregressive-full": ar_full,
    "masked-diffusion": masked_diffusion,
}
EXACT = ("autoregressive", "autoregressive-full")  # whose figure is -log p(x); that of the others is a bound on it


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What is trained and compared, and where it goes.

    Args:
        config: the Latent-Thought model's recipe, which the others follow but for the model.
        data: packed data, instead of the recipe's; with val and test splits.
        match: what is equal for all models besides the data: ``flops`` or ``tokens`` of training, or their number of
            ``parameters`` (and the budget).
        budget: of each training: FLOPs (2e12flops), fast steps included, or tokens (4e6tokens).
        seeds: of the trainings that are scored.
        rates: factors of the recipe's slow rate; each model takes the best of them on the validation split.
        share: of the budget that each of these trials has.
        samples, limit: S, and the sequences that are scored at most.
        out: a folder with a run for each training.
        trust: lets the recipe of a run or of an export name code of others.
    """

    config: str
    data: str | None
    match: Literal["flops", "tokens", "parameters"]
    budget: str
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    share: float
    samples: int
    limit: int | None
    out: Path
    trust: bool = False

    @property
    def amount(self) -> tuple[float, str]:
        """The budget's number and unit."""
        found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]{1,3})?)(flops|tokens)", self.budget)
        try:
            amount = float(found[1]) if found else 0.0
        except ValueError:
            amount = 0.0
        if found is None or not 1 <= amount < 1e30:
            raise UsageError(f"The budget {self.budget[:40]!r} is no amount: give 2e12flops or 4e6tokens.")
        if self.match != "parameters" and self.match != found[2]:
            raise UsageError(f"--match {self.match} needs a budget in {self.match}, got {self.budget}.")
        return amount, found[2]

    def check(self) -> None:
        """Refuses, before the first is trained, a model that could not be."""
        for name in MODELS:
            config = self.configure(name, share=self.share)
            check_budget(config)
            check_data(config)
            for split in ("val", "test"):
                read_manifest(config.data.directory).split(split, config.data.directory)
            if config.model.max_flops is not None and config.model.max_flops < self._flops_per_step(config):
                raise UsageError(
                    f"{self.share:g} of the budget {self.budget} is less than one step of {name}, "
                    f"{self._flops_per_step(config):.3g} FLOPs: raise --budget."
                )
            built = build_from_recipe(config)
            check_model(built.model, built.guide)

    def write_settings(self) -> None:
        """Writes what is compared into the folder; refuses one in which something else was compared."""
        place = self.configure(LTM).data.directory
        kept = {name: value for name, value in asdict(self).items() if name not in ("out", "trust")}
        settings = json.loads(json.dumps(kept | {"config": Path(self.config).read_text("utf-8")}))
        settings["pack"] = read_manifest(place).digest
        keep_settings(self.out / SETTINGS, settings, "baselines", "of another recipe, data or options")

    def configure(self, model: str, *options: str, share: float = 1.0, rate: float = 1.0, seed: int = 0) -> Namespace:
        """A model's recipe with a share of the budget, a factor on its slow rate, and a seed."""
        given = ["--config", self.config, *([f"--data.directory={self.data}"] if self.data else [])]
        given += ["--trust"] if self.trust else []
        base = read_recipe(given)
        amount, unit = self.amount
        settings = MODELS[model](base.model.decoder.init_args.as_dict())
        if self.match == "parameters" and model != LTM:
            settings = self._as_large(given, settings, base)
        steps = max(1, round(share * amount / tokens_per_step(base))) if unit == "tokens" else -1
        spent = Budget(share * amount, "flops").settings if unit == "flops" else Budget(1, "s").settings
        settings |= spent | {"trainer.max_time": None, "trainer.max_steps": steps}
        settings |= {"model.slow.rate": rate * base.model.slow.rate, "seed_everything": seed}
        return read_recipe([*given, *as_options(settings), *options])

    def _as_large(self, given: list[str], settings: Values, base: Namespace) -> Values:
        """The settings with the width whose number of parameters is nearest to the Latent-Thought model's."""
        wanted, width = _parameters(build_from_recipe(_with_vocabulary(base))), base.model.decoder.init_args.width
        step = 2 * base.model.decoder.init_args.heads

        def sized(width: int) -> Values:
            if "model.decoder" in settings:
                network = settings["model.decoder"]
                wider = network | {"init_args": network["init_args"] | {"width": width}}
                return {**settings, "model.decoder": wider}
            return {**settings, f"{DECODER}width": width}

        def count(width: int) -> int:
            return _parameters(build_from_recipe(_with_vocabulary(read_recipe([*given, *as_options(sized(width))]))))

        while count(width) < wanted:
            width += step
        below = max(step, width - step)
        return sized(min((below, width), key=lambda each: abs(count(each) - wanted)))

    def _flops_per_step(self, config: Namespace) -> float:
        built, length = build_from_recipe(_with_vocabulary(config)), read_manifest(config.data.directory).seq_len
        inference = built.inference.from_start()
        return tokens_per_step(config) * flops_per_token(built.model.decoder, built.guide, length, inference).total

    def pace(self, model: str) -> float:
        """The seconds that one training of the whole budget takes, from a few steps of it."""
        run = self.out / "pace" / model
        options = ("--trainer.max_steps", str(PACE), "--trainer.limit_val_batches", "0", "--model.max_flops=null")
        config = self.configure(model, "--run", str(run), "--force", *options, "--trainer.log_every_n_steps", "1")

        def measure() -> dict[str, Any]:
            train(config)
            rows = _metrics(run)
            seconds = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
            flops = float(rows[-1]["train/flops"]) - float(rows[0]["train/flops"])
            tokens = tokens_per_step(config) * (len(rows) - 1)
            return {"seconds": seconds, "flops": flops, "tokens": tokens}

        found = self._once(run, measure)
        amount, unit = self.amount
        return float(amount * found["seconds"] / max(found[unit], 1.0))

    def seconds(self) -> float:
        """The duration of all trainings, by `pace`; scoring and reports not counted."""
        each = len(self.rates) * self.share * (len(self.rates) > 1) + len(self.seeds)
        return each * sum(self.pace(model) for model in MODELS)

    def best_rate(self, model: str) -> float:
        """The factor on the slow rate with the lowest figure on the validation split, of trials of equal cost."""
        if len(self.rates) == 1:
            return self.rates[0]
        return min(self.rates, key=lambda rate: self.search(model, rate)["bound"])

    def search(self, model: str, rate: float) -> dict[str, Any]:
        """One trial of the search for the rate: its figure on the validation split; infinite if it is not finite."""
        run = self.out / "search" / f"{model}-{rate:g}"

        def measure() -> dict[str, Any]:
            silent = ("--trainer.limit_val_batches", "0")
            self._train(self.configure(model, *silent, share=self.share, rate=rate, seed=self.seeds[0]), run)
            found = evaluate_run(load_run(run), None, ["bound"], self._samples(model), limit=self.limit)
            return {"bound": found.estimates["bound"].nats_per_token, "rate": rate}

        found = self._once(run, measure)
        return found if found["bound"] is not None else found | {"bound": float("inf")}

    def run(self, model: str, seed: int) -> Path:
        """The folder of a training that is scored."""
        return self.out / "final" / f"{model}-{seed}"

    def figures(self, model: str, seed: int) -> dict[str, Any]:
        """A training of the whole budget at the model's best rate, scored once on the test split.

        It ends early after `PATIENCE` validations without a better figure.
        """
        run, rate = self.run(model, seed), self.best_rate(model)

        def measure() -> dict[str, Any]:
            self._train(self.configure(model, *self._stopping, rate=rate, seed=seed), run)
            trained = load_run(run)
            names = ["bound", "iwae"] if model == LTM else ["bound"]
            found = evaluate_run(trained, None, names, self._samples(model), limit=self.limit, split="test")
            record_test_use(run, trained.data)
            write_records(run, [x.as_dict() for x in document_scores(found)] if found.documents else [])
            bound, iwae = found.estimates["bound"], found.estimates.get("iwae")
            rows, checkpoint = _metrics(run), read_checkpoint(run)
            return {
                **{"model": model, "seed": seed, "rate": rate, "exact": model in EXACT},
                **{"nats_per_token": bound.nats_per_token, "stderr": bound.stderr_nats_per_token},
                **{"monte_carlo_stderr": bound.monte_carlo_stderr, "iwae": iwae and iwae.nats_per_token},
                **{"bits_per_byte": bound.bits_per_byte, "perplexity": bound.perplexity},
                **{"scored_tokens": found.tokens, "scored_documents": found.documents},
                "parameters": sum(p.numel() for p in trained.model.parameters()),
                "flops": checkpoint["state_dict"]["flops"].item(),
                "steps": checkpoint["global_step"],
                "seconds": float(rows[-1]["seconds"]) if rows else None,
            }

        return self._once(run, measure)

    def difference(self, model: str) -> dict[str, Any] | None:
        """By how much the Latent-Thought model's figure is above another's: paired by document, averaged over seeds.

        ``stderr`` has the error over documents and, with several seeds, that over seeds. None without documents.
        """
        records = {name: [read_records(self.run(name, seed)) for seed in self.seeds] for name in (LTM, model)}
        if not all(map(len, (*records[LTM], *records[model]))):
            return None
        found = compare(_averaged(records[LTM]), _averaged(records[model]))
        each = [compare(x, y).value for x, y in zip(records[LTM], records[model], strict=True)]
        over_seeds = statistics.stdev(each) / sqrt(len(each)) if len(each) > 1 else None
        return finite(
            {
                "nats_per_token": found.value,
                "stderr": sqrt(found.stderr**2 + (over_seeds or 0.0) ** 2),
                "over_documents": found.stderr,
                "over_seeds": over_seeds,
            }
        )

    def verdict(self, model: str) -> str:
        """What that difference says: a bound below an exact figure wins, a bound above it proves nothing."""
        found = self.difference(model)
        if found is None or found["stderr"] is None:
            return f"{LTM} and {model} cannot be compared document by document."
        above, error = found["nats_per_token"], found["stderr"]
        said = (
            f"The bound of {LTM} is {abs(above):.4f} ± {error:.4f} nats per token {'above' if above > 0 else 'below'} "
        )
        said += f"the {'exact figure' if model in EXACT else 'bound'} of {model}"
        if abs(above) < 2 * error:
            return f"{said}: they cannot be told apart."
        if model not in EXACT:
            return f"{said}: of two bounds neither says which model gives the texts more probability."
        return (
            f"{said}: it is better."
            if above < 0
            else f"{said}: that proves nothing, because its evidence may be lower."
        )

    def curve(self, model: str, seed: int) -> list[dict[str, float]]:
        """The learning curve of a training: its figure on the validation split by FLOPs, tokens and seconds."""
        tokens, flops, points = tokens_per_step(self.configure(model)), 0.0, []
        for row in _metrics(self.run(model, seed)):
            flops = float(row["train/flops"] or flops)
            if row["val/bound"]:
                at = {"flops": flops, "tokens": tokens * (int(row["step"]) + 1.0), "seconds": float(row["seconds"])}
                points.append(at | {"bound": float(row["val/bound"])})
        return points

    def _samples(self, model: str) -> int:
        return 1 if model in EXACT else self.samples  # an exact figure has no draws

    @property
    def _stopping(self) -> tuple[str, ...]:
        """The option that ends a training early, where the recipe validates."""
        if self.configure(LTM).trainer.limit_val_batches == 0:
            return ()
        arguments = {"monitor": "val/bound", "mode": "min", "patience": PATIENCE}
        callback = {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": arguments}
        return (f"--trainer.callbacks+={json.dumps(callback)}",)

    def _train(self, config: Namespace, run: Path) -> None:
        """A training that goes on from its checkpoint if it was begun."""
        if (run / TRAINED).exists():  # one that has ended early would go on
            return
        config.run, begun = str(run), run / CHECKPOINT
        config.ckpt_path, config.force = (str(begun), False) if begun.exists() else (None, True)
        train(config)
        (run / TRAINED).touch()

    def _once(self, run: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures in a run's folder, measured if they are not there."""
        file = run / RESULT
        if not file.exists():
            found = finite(measure())
            with atomic_write(file) as new:
                new.write_text(json.dumps(found, ensure_ascii=False), "utf-8")
        stored: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return stored


def _with_vocabulary(config: Namespace) -> Namespace:
    if config.model.vocabulary is None:
        config.model.vocabulary = read_manifest(config.data.directory).vocabulary
    return config


def _parameters(built: BuiltModel) -> int:
    return sum(p.numel() for p in built.model.parameters())


def _metrics(run: Path) -> list[dict[str, str]]:
    with (run / METRICS).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["seconds"]]


def _averaged(runs: list[Records]) -> Records:
    """The figures of each document, averaged over trainings."""
    first, *others = runs
    found = []
    for rows in zip(first, *others, strict=True):
        nats = [row["bound_nats"] for row in rows]
        found.append({**rows[0], "bound_nats": None if None in nats else sum(nats) / len(nats)})
    return found
