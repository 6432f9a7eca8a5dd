"""What every training of a comparison may spend: floating-point operations or seconds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ltm_pyro.data import read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values
from ltm_pyro.training.cost_summary import tokens_per_step

MAX_FLOPS = "model.max_flops"  # the recipe's key
TOLERANCE = 0.02  # by how much two trainings of one budget may differ, as a fraction of it


@dataclass(frozen=True)
class Budget:
    """An amount of training: floating-point operations, fast steps included, or seconds.

    A step with more fast steps costs more, so equal steps would be unfair; equal FLOPs are not, whatever the machine.
    """

    amount: float
    unit: str  # flops or s

    def __str__(self) -> str:
        return f"{self.amount:.4g}{self.unit}"

    @property
    def settings(self) -> Values:
        """The recipe settings with which a training ends when the budget is spent, and for no other reason."""
        return {
            MAX_FLOPS: self.amount if self.unit == "flops" else None,
            "trainer.max_time": max_time(self.amount) if self.unit == "s" else None,
            "trainer.max_steps": -1,
            "trainer.max_epochs": -1,
        }


def parse_budget(text: str) -> Budget:
    """``2e13flops``, ``120s``, ``5m`` or ``1h``; whole seconds, since the trainer counts no others."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)(flops|s|m|h)", text)
    try:
        seconds = {"m": 60, "h": 3600}.get(found[2], 1) if found else 1
        budget = Budget(float(found[1]) * seconds, "flops" if found[2] == "flops" else "s") if found else None
    except ValueError:
        budget = None
    if budget is None or not 1 <= budget.amount < math.inf:
        raise UsageError(
            f"The budget {text!r} is not an amount of training: give FLOPs (2e13flops) or a time (120s, 5m, 1h)."
        )
    return budget


def max_time(seconds: float) -> str:
    """Seconds as Lightning's ``DD:HH:MM:SS``, rounded to whole ones."""
    days, rest = divmod(round(seconds), 86_400)
    return f"{days:02}:{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def check_dearest_step(module: Any, config: Any) -> None:
    """Refuses a budget of FLOPs that a training would overspend: its last step, at most the dearest, is too large.

    A curriculum that begins without fast steps has cheap steps first; the dearest of the whole training counts.
    """
    if not module.max_flops:
        return
    cost = partial(module.cost, read_manifest(config.data.directory).seq_len)
    stages = {str(x): x for x in (module.curriculum.at(i / 100, module.inference, cost) for i in range(101))}
    step = tokens_per_step(config) * max(map(cost, stages.values()))
    if step > TOLERANCE * module.max_flops:
        raise UsageError(
            f"The budget {module.max_flops:.4g}flops is less than {1 / TOLERANCE:.0f} of the dearest steps, which cost "
            f"{step:.3g}flops each: raise it to {step / TOLERANCE:.2g}flops, or make the batches smaller."
        )


def unequal_spends(flops: Sequence[float], budget: str) -> str:
    """What trainings of one budget have spent, and a warning where it is not the same; "" without figures."""
    if not flops:
        return ""
    least, most, budget_is = min(flops), max(flops), parse_budget(budget)
    if budget_is.unit == "flops":
        if max(abs(x / budget_is.amount - 1) for x in (least, most)) <= TOLERANCE:
            return f" Spent: {least:.4g} to {most:.4g} FLOPs each."
        return (
            f" Spent: {least:.4g} to {most:.4g} FLOPs each, of a budget of {budget}: they differ by more than "
            f"{100 * TOLERANCE:g} %, and the comparison is not fair; make the batches smaller, or the budget larger."
        )
    if most < 1.5 * least:
        return ""
    return (
        f" The same {budget} bought {least:.2g} to {most:.2g} FLOPs: if the machine had other work to do, the "
        f"comparison is not fair; a budget in FLOPs always is."
    )
