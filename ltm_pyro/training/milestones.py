"""What an onlooker hears while a model trains: how far it is, and how good at agreed fractions of its budget."""

from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning.callbacks import Callback

from ltm_pyro.contracts import Batch
from ltm_pyro.training.module import LTMModule


class Milestones(Callback):
    """Calls ``tick(progress)`` after every step, ``report(index, score(module))`` past every fraction of the budget.

    The budget is whatever ends the training (steps, time or FLOPs), so that unequally dear steps stay comparable.

    Args:
        fractions: increasing, each in (0, 1); a step that passes several reports the last of them.
        score: judges the module, which is in evaluation mode meanwhile.
    """

    def __init__(
        self,
        fractions: Sequence[float],
        score: Callable[[LTMModule], float],
        report: Callable[[int, float], None],
        tick: Callable[[float], None],
    ) -> None:
        self._fractions, self._score, self._report, self._tick = fractions, score, report, tick
        self._passed = 0
        self.tokens = 0  # that training has gone through, of all ranks; places for tokens, as FLOPs count them

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        """Counts, ticks, and reports what has just been passed."""
        self.tokens += trainer.world_size * batch.inputs_BT.numel()
        progress = module.progress
        self._tick(progress)
        passed = sum(fraction <= progress for fraction in self._fractions)
        if passed > self._passed and progress < 1:
            module.eval()
            self._report(passed - 1, self._score(module))
            module.train()
        self._passed = passed
