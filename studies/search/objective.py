"""One setting trained and scored: the honest bound on validation, and what it cost.

Shapes: B sequences, S posterior samples.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from ltm_pyro.data import read_manifest
from ltm_pyro.data.dataset import open_pack
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.context import context_recovered, is_task, known_references
from ltm_pyro.evaluation.documents import Records, document_scores, read_records, write_records
from ltm_pyro.evaluation.evaluate import coarse_block, evaluate_run, k_hat
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.estimators import ESTIMATORS
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.budget import Budget, check_dearest_step
from ltm_pyro.studies.configure import Values, configure
from ltm_pyro.studies.search.samplers import RUNGS
from ltm_pyro.training.flops import flops_per_token
from ltm_pyro.training.milestones import Milestones
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.run_directory import read_checkpoint
from ltm_pyro.training.train import train
from ltm_pyro.utils.files import new_folder

Figures = dict[str, float]
NEED_BOUND = ("bound", "bound_stderr", "kl", "k_hat", "iwae", "ais", "context_recovered")
ASKED = ("iwae", "ais", "context_recovered")  # recorded where an objective or a limit names them
PREDICTIVE = ("causal", "predictive_gain", "predictive_gain_stderr")
COSTS = ("flops", "tokens", "seconds", "flops_per_token", "inference_flops_per_token", "parameters", "peak_memory_mib")
RECORDED = (*NEED_BOUND[:4], "prior", *PREDICTIVE, *COSTS)  # what `train_and_score` returns
REFERENCES = ("floor", "ceiling")  # folders beside the trials' runs, with the figures by document of both
K_HAT_SEQUENCES, K_HAT_DRAWS = 8, 256


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training to score.

    Args:
        recipe: the base recipe's file.
        options: what is changed in it, dotted key to value; the budget is among them.
        parameters: the study's own parameters that the options come from.
        run: where the run is written.
        samples, limit: S draws per sequence after q is final, and how many held-out sequences are scored.
        k_hat: whether the median Pareto k-hat is recorded; it costs 256 draws for each of 8 sequences.
        asked: of `ASKED`, the figures that are recorded as well.
        pruned: whether the bound is reported at `RUNGS`.
        tick, report: called with the progress; and with a rung, the bound there, and that of every document.
    """

    recipe: str
    options: Values
    parameters: Values
    run: Path
    samples: int = 8
    limit: int = 64
    k_hat: bool = False
    asked: tuple[str, ...] = ()
    pruned: bool = False
    tick: Callable[[float], None] = field(default=lambda progress: None)
    report: Callable[..., None] = field(default=lambda rung, bound, documents=(): None)


Objective = Callable[[Setting], Mapping[str, float]]


def options_of(budget: Budget, settings: Values, run: Path, seed: int) -> Values:
    """Everything a trial changes in the base recipe: its point, its budget, its run; it never validates."""
    fixed = {"trainer.limit_val_batches": 0, "run": str(run), "seed_everything": seed}
    return {**budget.settings, **settings, **fixed}


def train_and_score(setting: Setting) -> Figures:
    """Trains as the setting says, then scores the honest bound.

    Returns:
        ``bound`` (nats per token, noise drawn after q is final), ``bound_stderr``, ``prior`` (no inference), ``kl``;
        ``causal``, ``predictive_gain`` (see `Evaluation`; in coarse blocks) and ``predictive_gain_stderr``; ``flops``,
        ``tokens``, ``seconds`` and ``flops_per_token`` of training; ``inference_flops_per_token`` of fitting q and
        scoring once; ``parameters``; ``peak_memory_mib``; and what of `ASKED` the setting asks for. The figures of
        `NEED_BOUND` are left out if prior and guide have no bound.
    """
    config = configure(setting.recipe, setting.options)
    config.force = True  # a retried trial replaces the run of the attempt that died
    milestones = Milestones(
        RUNGS if setting.pruned else (),
        _bound_during_training(config, setting),
        lambda rung, found: setting.report(rung, *found),
        setting.tick,
        lambda module: check_dearest_step(module, config),
    )
    begun = time.monotonic()
    path = train(config, [milestones])
    seconds = time.monotonic() - begun
    run = load_run(path)
    return {**score(run, setting), **costs(run, path, milestones.tokens), "seconds": seconds}


def score(run: Run, setting: Setting, fast_steps: int | None = None) -> Figures:
    """The bound and the predictive gain, nats per held-out token; ``fast_steps`` when not the recipe's own.

    With the recipe's own, the figures of each document stay in the run's folder.
    """
    has_bound = not missing_bound(run.model, run.guide)
    asked = [name for name in setting.asked if has_bound and name in ESTIMATORS]
    found = evaluate_run(
        run,
        estimators=("bound", "prior", *GAIN, *asked),
        samples=setting.samples,
        fast_steps=fast_steps,
        limit=setting.limit,
        block=coarse_block(run),
    )
    if found.excluded:  # a mean over other sequences could not be compared with those of other trials
        raise UsageError(
            f"{len(found.excluded)} of {len(found.excluded) + found.sequences} held-out sequences have no finite score."
        )
    if found.no_bound:
        raise UsageError(f"No figure is a bound, because {found.no_bound}: nothing can be ranked by it.")
    records = [x.as_dict() for x in document_scores(found)] if found.documents else []
    if fast_steps is None and records:
        write_records(setting.run, records)
    bound, gain = found.estimates.get("bound"), found.predictive_gain
    known = [name for name in ("prior", "causal", *asked) if name in found.estimates]  # masked diffusion has no `prior`
    figures = {name: found.estimates[name].nats_per_token for name in known}
    if gain:
        figures |= {"predictive_gain": gain.nats_per_token, "predictive_gain_stderr": gain.stderr_nats_per_token}
    if bound is None:
        return figures
    figures |= {
        "bound": bound.nats_per_token,
        "bound_stderr": bound.stderr_nats_per_token,
        "kl": bound.kl_nats_per_token,
    }
    if "context_recovered" in setting.asked:
        figures["context_recovered"] = _context_recovered(run, records, setting.run.parent)
    return figures | ({"k_hat": k_hat(run, K_HAT_SEQUENCES, K_HAT_DRAWS).median().item()} if setting.k_hat else {})


def _context_recovered(run: Run, records: Records, out: Path) -> float:
    """R of the bound (see `Context`), between the references beside the trials' runs, or those of a task."""
    references = [read_records(out / name) for name in REFERENCES]
    if not all(references):
        if not is_task(records, run.reach):
            raise UsageError(
                "`context_recovered` needs a floor and a ceiling, and this text has no known ones: give --floor and "
                "--ceiling."
            )
        references = [*known_references(records, run.reach)]
    recovered = context_recovered([records], [references[0]], [references[1]], ["bound"]).recovered
    if not recovered:
        raise UsageError("Full attention is not ahead of the floor by three standard errors: there is no context.")
    return recovered["bound"].share


def write_references(folder: Path, runs: Sequence[str], limit: int, trust: bool = False) -> None:
    """Scores the floor and the ceiling of the context recovered, on the texts that score the trials."""
    for name, place in zip(REFERENCES, runs, strict=True):
        found = evaluate_run(load_run(place, trust=trust), estimators=("bound",), samples=1, limit=limit)
        with new_folder(folder / name):
            write_records(folder / name, [x.as_dict() for x in document_scores(found)])


def costs(run: Run, path: Path, tokens: int) -> Figures:
    """What training has spent on its ``tokens``, and what inference costs per held-out token."""
    flops = read_checkpoint(path)["state_dict"]["flops"].item()
    return {
        "flops": flops,
        "tokens": tokens,
        "flops_per_token": flops / tokens,
        "inference_flops_per_token": inference_flops(run, read_manifest(run.data).seq_len),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "peak_memory_mib": peak_memory(),
    }


def inference_flops(run: Run, length: int) -> float:
    """FLOPs per token of one fit of q and one forward pass (a third of a slow step)."""
    spent = flops_per_token(run.model.decoder, run.guide, length, replace(run.inference, slow_gradient="last"))
    return spent.fast + spent.slow / 3


def peak_memory() -> float:
    """MiB: of the device if there is one (unverified), else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _bound_during_training(config: Namespace, setting: Setting) -> Callable[[LTMModule], tuple[float, list[float]]]:
    """The bound of a module in training, and of every document, on the sequences that score it at the end."""

    def bound(module: LTMModule) -> tuple[float, list[float]]:
        model: Any = module.model
        _, tokenizer = open_pack(config.data.directory)
        data, length = config.data, model.decoder.length
        run = Run(model, module.guide, tokenizer, module.evaluation, data.directory, length)
        run = run._replace(score=data.score, observe=data.observe)
        found = evaluate_run(run, estimators=("bound",), samples=setting.samples, limit=setting.limit)
        documents = [x.nats["bound"] / x.tokens for x in document_scores(found) if x.tokens] if found.documents else []
        return found.estimates["bound"].nats_per_token, documents

    return bound
