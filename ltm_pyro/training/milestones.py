"""A callback at given fractions of the training budget."""

from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning.callbacks import Callback

from ltm_pyro.contracts import Batch
from ltm_pyro.training.module import LTMModule


class Milestones(Callback):
    """Calls ``tick(progress)`` after every batch, and ``report(index, score(module))`` after each of some fractions.

    They are fractions of the budget that ends the training (steps, epochs, time or FLOPs), so that trainings whose
    steps have different costs can be compared.

    Args:
        fractions: increasing, each in (0, 1); a step that passes several of them reports the last.
        score: evaluates the module, which is in evaluation mode during the call.
        check: called with the module before the first step; may refuse it.
    """

    def __init__(
        self,
        fractions: Sequence[float],
        score: Callable[[LTMModule], Any],
        report: Callable[[int, Any], None],
        tick: Callable[[float], None],
        check: Callable[[LTMModule], None] = lambda module: None,
    ) -> None:
        self._fractions, self._score, self._report, self._tick, self._check = fractions, score, report, tick, check
        self._passed = 0
        self.tokens = 0  # trained on so far by all ranks, padding included, as for FLOPs

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Calls `check`."""
        self._check(module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        """Counts tokens, then calls `tick`, and `report` if a fraction has just been passed."""
        self.tokens += trainer.world_size * batch.inputs_BT.numel()
        progress = module.progress
        self._tick(progress)
        passed = sum(fraction <= progress for fraction in self._fractions)
        if passed > self._passed and progress < 1:
            module.eval()
            self._report(passed - 1, self._score(module))
            module.train()
        self._passed = passed
