"""What all trials of a study share: it is stored with them, and a trial under another plan is refused."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ltm_pyro.data import read_manifest
from ltm_pyro.data.manifest import is_pack
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.budget import MAX_FLOPS, check_dearest_step, parse_budget
from ltm_pyro.studies.configure import Values, configure
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.objective import ASKED, NEED_BOUND, RECORDED, options_of
from ltm_pyro.studies.search.samplers import PRUNERS, SAMPLERS, check_name_of
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.recipe import build_module, check_budget, check_data, check_seed, dump_recipe

SEQUENCES = ("minimise", "maximise", "references")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that two trials must share to be compared.

    Args:
        study, question: the definition's name, and what it asks.
        space: parameter name to distribution, as plain data.
        recipe: the base recipe's text, every default written out.
        pack: the digest of the packed data.
        budget: what each trial may spend.
        minimise, maximise: the figures that are the objectives; with more than one the result is a Pareto front.
        at_most: figure to limit; a trial above one is infeasible.
        samples, limit: how the bound is scored.
        sampler: one of `SAMPLERS`, which proposes the points.
        pruner: one of `PRUNERS`, which gives up trials that are behind.
        references: the runs that are floor and ceiling of the context recovered; none where a task knows both.
        seed: of the sampler and of every training.
    """

    study: str
    question: str
    space: dict[str, Any]
    recipe: str
    budget: str
    pack: str = "unknown"  # in studies made before it was stored
    minimise: tuple[str, ...] = ("bound",)
    maximise: tuple[str, ...] = ()
    at_most: dict[str, float]
    samples: int = 8
    limit: int = 64
    sampler: str = "tpe"
    pruner: str = "none"
    references: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_name_of("sampler", self.sampler, SAMPLERS)
        check_name_of("pruner", self.pruner, PRUNERS)
        names = [name for name, _ in self.objectives]
        if self.pruned and len(names) > 1:
            raise UsageError(f"Pruning needs one objective, got {', '.join(names)}: drop --prune, or all but one.")
        if self.pruned and self.maximise:
            raise UsageError("Pruning goes by the bound, of which less is better: drop --prune, or --maximise.")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{twice} is an objective twice: name it once, under --minimise or --maximise.")

    @property
    def pruned(self) -> bool:
        """Whether trials that are behind are given up early."""
        return self.pruner != "none"

    @property
    def objectives(self) -> tuple[tuple[str, int], ...]:
        """The figures that decide, and 1 where less is better, −1 where more is."""
        return (*((name, 1) for name in self.minimise), *((name, -1) for name in self.maximise))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` takes it."""
        return asdict(self) | {name: list(getattr(self, name)) for name in SEQUENCES}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Plan":
        """The plan that `as_dict` made; `TypeError` or `KeyError` if that was another version."""
        kept = {k: v for k, v in stored.items() if k != "pruned"}
        if stored.get("pruned"):  # as plans had it before pruners had names
            kept["pruner"] = "hyperband"
        return cls(**kept | {name: tuple(kept.get(name, ())) for name in SEQUENCES})

    def difference(self, other: "Plan") -> str | None:
        """The first field in which two plans differ, with both values, the other's first; None if they are equal.

        The same packed data may lie elsewhere.
        """
        pairs = {f.name: (getattr(other, f.name), getattr(self, f.name)) for f in fields(self)}
        if self.pack == other.pack != "unknown":
            pairs["recipe"] = (_without_place(other.recipe), _without_place(self.recipe))
        differing = next(((name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]), None)
        return differing and _describe_difference(*differing)


def _without_place(recipe: str) -> str:
    """A recipe's text without the directory of its data."""
    return re.sub(r"^(data:\n(?:  .*\n)*?)  directory: .*\n", r"\1", recipe, flags=re.MULTILINE)


def _describe_difference(name: str, there: Any, here: Any) -> str:
    """A difference in a few words; of a space the parameter, of texts of several lines the first ones that differ."""
    about = ""
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        there, here = ("nothing" if key not in x else _plain_value(x[key]) for x in (there, here))
        about = f"{key}: "
    lines = zip_longest(str(there).splitlines(), str(here).splitlines(), fillvalue="nothing")
    one, other = next((pair for pair in lines if pair[0] != pair[1]), (there, here))
    return f"{name} ({about}{_short(one)}, not {_short(other)})"


def _plain_value(value: Any) -> Any:
    """A stored distribution in a few words."""
    if not isinstance(value, dict) or "attributes" not in value:
        return value
    said = {k: v for k, v in value["attributes"].items() if v not in (None, False)}
    return ", ".join(f"{k} {v}" for k, v in said.items())


def _short(value: Any) -> str:
    return text if len(text := str(value).strip()) < 60 else f"{text[:57]}…"


def base_recipe(recipe: str, changes: Values, trust: bool = False) -> tuple[str, str]:
    """The text of a base recipe with some keys changed, complete and ready to train; and its data's digest.

    ``trust`` lets the recipe of a run or of an export name code of others.
    """
    config = configure(recipe, changes, trust=trust)
    if not is_pack(config.data.directory):
        raise UsageError(
            f"There is no packed data at {config.data.directory}: name some with --set data.directory=DIR, "
            f"or take the quickstart's, `--set data.directory=runs/quickstart/data` after `make quickstart`."
        )
    check_data(config)
    config.run = "runs/ltm"
    manifest = read_manifest(config.data.directory)
    manifest.split("val", config.data.directory)  # every trial is scored on it
    return dump_recipe(config), manifest.digest


def check_changes(definition: Definition, changes: Values, budget: str | None) -> None:
    """Refuses changes to the recipe that every trial overrides, and a budget if the points have their own."""
    searched = {key for point in definition.tried for key in definition.options(point)}
    if budget and MAX_FLOPS in searched:
        raise UsageError(f"The points of {Path(definition.source).stem} say what they spend: leave --budget out.")
    own = {*options_of(parse_budget("1s"), {}, Path(), 0), "force", "ckpt_path"}
    for change in _dotted_keys(changes):
        key = next((k for k in sorted(searched | own) if f"{_plain(change)}.".startswith(f"{_plain(k)}.")), None)
        if key:
            hint = "" if key in searched else ", and see --budget, --seed and --out"
            raise UsageError(
                f"--set {change} would change nothing, because the study sets `{key}` in every trial: "
                f"leave it out{hint}."
            )


def _dotted_keys(values: Values, above: str = "") -> Iterator[str]:
    """The dotted keys of nested settings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _dotted_keys(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _plain(key: str) -> str:
    return key.replace(".init_args.", ".")


def check_plan(plan: Plan, definition: Definition, recipe: Path) -> None:
    """Refuses what would fail in every trial: a setting or a figure that there is not, a budget of too few steps."""
    _check_figures(plan, definition)
    budget = parse_budget(plan.budget)
    configs = []
    for point in definition.tried:
        if wrong := definition.misfit(point):
            raise UsageError(f"The study's point {point} is none of its space: {wrong}; correct it.")
        settings = definition.options(point)
        for each in (settings, ar_baseline(settings)) if definition.checks else (settings,):
            config = configure(str(recipe), options_of(budget, each, recipe.parent, plan.seed))
            check_budget(config)
            check_seed(config)
            configs.append(config)
    for pair in {str((c.model.prior, c.model.guide)): c for c in configs}.values():
        _check_bound(plan, pair)
    for config in {str(config.model): config for config in configs}.values():
        check_dearest_step(_module(config), config)


def _check_figures(plan: Plan, definition: Definition) -> None:
    """Refuses a figure that no trial records; every trial would be trained, and then fail."""
    known = (*RECORDED, *ASKED, *definition.figures)
    if unknown := [name for name in (*dict(plan.objectives), *plan.at_most) if name not in known]:
        near = get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"No trial records a figure {unknown[0]!r}{hint}: choose from {', '.join(known)}, or name it in `figures` "
            f"of the study's file."
        )


def _check_bound(plan: Plan, config: Any) -> None:
    """Refuses to score a prior and a guide by a bound that they do not have."""
    named = (*dict(plan.objectives), *plan.at_most, *["bound"] * plan.pruned)
    asked = [name for name in named if name in NEED_BOUND]
    if not asked:
        return
    module = _module(config)
    if reason := missing_bound(module.model, module.guide):
        raise UsageError(
            f"No trial can have `{asked[0]}`, because {reason}: choose another prior or guide, or --minimise prior "
            f"without --prune."
        )


def _module(config: Any) -> LTMModule:
    check_data(config)
    return build_module(config)
