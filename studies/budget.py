"""What every training of a comparison may spend: floating-point operations or seconds."""

import math
import re
from dataclasses import dataclass

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values

MAX_FLOPS = "model.max_flops"  # the recipe's key


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
    """``2e13flops`` or ``120s``; whole seconds, since the trainer counts no others."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)(flops|s)", text)
    try:
        budget = Budget(float(found[1]), found[2]) if found else None
    except ValueError:
        budget = None
    if budget is None or not 1 <= budget.amount < math.inf:
        raise UsageError(f"The budget {text!r} is not an amount of training: give FLOPs (2e13flops) or seconds (120s).")
    return budget


def max_time(seconds: float) -> str:
    """Seconds as Lightning's ``DD:HH:MM:SS``, rounded to whole ones."""
    days, rest = divmod(round(seconds), 86_400)
    return f"{days:02}:{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
