"""Training on several ranks: one that is lost, or does not answer, ends the others with a sentence.

Left alone, Lightning kills the first rank without a word a few seconds after another has ended, and torch waits for
half an hour for a rank that has stopped.

Until its first step a rank may import or compile, so that torch has to wait for it for minutes. One that is stopped
does neither: the first rank looks at those that it has started, and they look at it.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from ltm_pyro.utils.processes import STARTER, is_stopped, starter

START = timedelta(minutes=5)  # that a rank is waited for until its first step is done: it imports, and may compile
PATIENCE = timedelta(seconds=40)  # the same for all later steps; a recipe may give the strategy a timeout of its own
STOPPED = timedelta(seconds=20)  # that a rank of this machine may be stopped, at any time
GRACE = 5.0  # seconds in which a rank notices by itself that another has ended
POLL = 0.2
_LOST = re.compile(r"gloo|NCCL|timeout caused pair closure|[Cc]onnection (closed|reset|refused)|Timed out|Broken pipe")


class Ranks(Callback):
    """Sets how long the ranks of a training wait for each other, and watches those that this one starts."""

    def __init__(self) -> None:
        self.has_noticed = False  # this rank ends already, with a sentence of its own
        self._is_patient = True  # the timeout is the last one that is set

    def prepare(self, trainer: Any) -> None:
        """To be called before the other ranks are started."""
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy):
            return
        self._is_patient = strategy._timeout != default_pg_timeout
        stopped = strategy._timeout if self._is_patient and strategy._timeout else STOPPED
        if not self._is_patient:
            strategy._timeout = START
        if type(strategy._launcher) is _SubprocessScriptLauncher:
            strategy._launcher = _Launcher(strategy, self, stopped)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """After the first step everything is imported and compiled."""
        if trainer.world_size > 1 and not self._is_patient:
            _set_pg_timeout(PATIENCE)
            self._is_patient = True

    def is_lost(self, trainer: Any, error: BaseException) -> bool:
        """Whether an error says that another rank has ended, or does not answer."""
        told = isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None
        lost = trainer.world_size > 1 and isinstance(error, RuntimeError) and told
        self.has_noticed = self.has_noticed or lost
        return lost


class _Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and ends this one with a sentence if one of them is lost, or stopped."""

    def __init__(self, strategy: Any, ranks: Ranks, stopped: timedelta) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._ranks, self._stopped = ranks, stopped.total_seconds()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """As Lightning's, with another observer."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[STARTER] = starter(self._stopped)  # each looks at this one
            self._call_children_scripts()
            del os.environ[STARTER]  # which is for the other ranks
            threading.Thread(target=self._watch, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        stopped = [0.0] * len(ranks)  # seconds in which this process has run: Ctrl-Z stops all of them together
        while not any(rank.poll() for rank in ranks) and max(stopped) < self._stopped:
            if all(rank.returncode == 0 for rank in ranks):
                return
            time.sleep(POLL)
            running = [rank.returncode is not None or not is_stopped(rank.pid) for rank in ranks]
            stopped = [0.0 if runs else seconds + POLL for runs, seconds in zip(running, stopped, strict=True)]
        if max(stopped) >= self._stopped:
            _say(f"Rank {1 + stopped.index(max(stopped))} has been stopped")
        else:
            time.sleep(GRACE)
            number, code = next((n, rank.returncode) for n, rank in enumerate(ranks, 1) if rank.returncode)
            if self._ranks.has_noticed:
                time.sleep(GRACE)  # its end may take some time, but not for ever
            else:
                _say(
                    f"Rank {number} " + (f"was killed by signal {-code}" if code < 0 else f"has ended with code {code}")
                )
        for rank in ranks:
            rank.kill()
        os._exit(2)


def _say(reason: str) -> None:
    print(f"ltm fit: {reason}: see what it said, and start the training again.", file=sys.stderr, flush=True)
