import os
import signal

import pytest
import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.utils import parallel
from ltm_pyro.utils.parallel import parallel_map


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_are_in_the_order_of_the_items(workers, monkeypatch):
    monkeypatch.setattr(parallel, "AHEAD", 4)
    before = torch.get_rng_state()
    found = parallel_map(lambda number: (torch.full((2,), number), os.getpid()), range(31), workers)
    (first, _), *others = [next(found), *found]
    assert first.tolist() == [0, 0]
    assert [x.tolist() for x, _ in others] == [[n, n] for n in range(1, 31)]
    assert ({os.getpid()} == {process for _, process in others}) == (workers == 1)
    assert torch.equal(before, torch.get_rng_state())


def test_not_all_items_are_read_at_once(monkeypatch):
    monkeypatch.setattr(parallel, "AHEAD", 4)
    taken = []
    found = parallel_map(abs, (taken.append(n) or n for n in range(100)), 2)
    next(found)
    assert len(taken) == 8


def test_an_error_is_raised_as_it_was():
    def refuse(number):
        raise UsageError(f"{number} is too large: give 3.")

    with pytest.raises(UsageError, match=r"^7 is too large: give 3\.$"):
        list(parallel_map(refuse, [7, 8], 2))
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda n: 1 / n, [0, 0], 2))
    with pytest.raises(RuntimeError, match="a fault"):
        list(parallel_map(lambda n: exec("raise RuntimeError('a fault')"), [0, 0], 2))


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(UsageError, match="worker process was killed"):
        list(parallel_map(lambda n: os.kill(os.getpid(), signal.SIGKILL), [0, 0], 2))
