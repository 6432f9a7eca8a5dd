"""Two threads at once: every public function gives what it gives alone, and torch's generator stays where it was."""

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from pyro import poutine

from ltm_pyro import Sampling, Scoring, evaluate_run, generate, interpolate, score, score_continuations
from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.threads import one_at_a_time

TEXT = "the old model reads a long text"


def evaluation(run: Run, seed: int):
    """The figures of all estimators that have different paths through Pyro."""
    found = evaluate_run(run, run.data, ["bound", "iwae", "causal"], samples=2, limit=2, seed=seed)
    return repr(found.estimates)  # because the error of a single row is NaN, which equals nothing


def posterior(run: Run, seed: int):
    """The draws of q for one text."""
    return draw_posterior(run, [TEXT], DrawOptions(samples=25), seed=seed).z.values.tolist()


CALLS = {  # name -> what is called with a run and a random seed
    "generate": lambda run, seed: generate(run, [TEXT, ""], Sampling(max_new_tokens=4), seed=seed),
    "interpolate": lambda run, seed: interpolate(run, (TEXT, "short"), 2, Sampling(max_new_tokens=2), seed=seed),
    "score": lambda run, seed: score(run, [TEXT], Scoring(samples=2, seed=seed)),
    "score_continuations": lambda run, seed: score_continuations(run, [(TEXT, " a")], Scoring(samples=2, seed=seed)),
    "evaluate_run": evaluation,
    "draw_posterior": posterior,
}


@pytest.fixture
def two_runs(tiny_run, tmp_path):
    """Two runs of different weights, each with a text of its own to be evaluated on."""
    runs = []
    for index in range(2):
        torch.manual_seed(index)
        path = tmp_path / f"{index}.txt"
        path.write_text(f"{TEXT} and writes {index} words\n" * 3)
        runs.append(tiny_run()._replace(data=str(path)))
    return runs


def check(runs: list[Run], names: list[str], calls: int) -> None:
    """Runs the named functions ``calls`` times in a thread per run, and compares every result with the serial one."""
    work = [(names[index % len(names)], index // len(names) % 3) for index in range(calls)]
    serial = [{job: CALLS[job[0]](run, job[1]) for job in dict.fromkeys(work)} for run in runs]
    assert serial[0] != serial[1], "the runs are to differ, or a mix-up would not be seen"
    with one_at_a_time:  # a thread of the caller's may be inside a block of its own just now
        before, together = torch.get_rng_state(), threading.Barrier(len(runs))

    def one_thread(index: int) -> list:
        together.wait()
        return [(job, CALLS[job[0]](runs[index], job[1]) == serial[index][job]) for job in work]

    with ThreadPoolExecutor(len(runs)) as pool:
        for found in pool.map(one_thread, range(len(runs))):
            assert [job for job, equal in found if not equal] == []
            assert len(found) == calls
    with one_at_a_time:
        assert torch.equal(torch.get_rng_state(), before)


def test_two_threads_with_a_run_each_equal_their_serial_results(two_runs):
    check(two_runs, [*CALLS], 2 * len(CALLS))


def test_two_threads_with_one_run_equal_their_serial_results(tiny_run, two_runs):
    shared = two_runs[0]
    check([shared, shared._replace(data=two_runs[1].data)], ["evaluate_run", "generate", "score"], 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_two_threads_of_200_calls_each_equal_their_serial_results(two_runs, name):
    check(two_runs, [name], 200)


def test_seeded_blocks_do_not_meet(two_runs):
    def draw(seed: int) -> list[float]:
        with seeded(seed):
            return [torch.rand(()).item() for _ in range(1000)]

    serial = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(draw, range(4))] == serial


def test_a_users_own_pyro_code_takes_the_same_lock(two_runs):
    model, stop = two_runs[0].model, threading.Event()

    def trace_again_and_again() -> int:
        traces = 0
        while not stop.is_set():
            with one_at_a_time, torch.random.fork_rng():
                traces += len(poutine.trace(model.sample_prior).get_trace(2).nodes) > 0
        return traces

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(trace_again_and_again)
        try:
            check(two_runs[1:] + two_runs[:1], ["generate"], 3)
        finally:
            stop.set()
        assert others.result() > 0


def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have():
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    child = get_context("fork").Process(target=one_at_a_time.__enter__)
    child.start()
    child.join(60)
    done.set()
    holder.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("name", CALLS)
def test_the_callers_generator_stays_where_it_was(two_runs, name):
    before = torch.get_rng_state()
    CALLS[name](two_runs[0], 1)
    assert torch.equal(torch.get_rng_state(), before)
