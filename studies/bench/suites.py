"""What `ltm bench` runs: training steps side by side, attention by length, and the suites of the other files here."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.nn.attention import BACKENDS, backend
from ltm_pyro.studies.bench.clock import (
    How,
    compiler,
    in_turn,
    machine,
    matrix_rate,
    median_interval,
    peak_bytes,
    spread,
)
from ltm_pyro.studies.bench.generation import generation
from ltm_pyro.studies.bench.head import head
from ltm_pyro.studies.bench.methods import Attention, Kind, Method, Precision, make_step
from ltm_pyro.studies.bench.settings import CUDA_SETTINGS, SETTINGS, SWEEP_BASE, SWEEPS, Setting

KINDS: tuple[Kind, ...] = ("ours", "handwritten", "naive")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
ATTENTIONS: tuple[Attention, ...] = ("sdpa", "xformers", "flex")
NOT_RUN = "not run: no CUDA device"
ALL_SETTINGS = (*SETTINGS, *CUDA_SETTINGS)
Report = dict[str, Any]


def bench(
    suites: Iterable[str],
    how: How,
    settings: Sequence[str] | None = None,
    tell: Callable[[str], Any] = lambda _: None,
) -> Report:
    """The report of some of the `SUITES`, after a description of the machine.

    Args:
        settings: those that `steps` and `pyro` measure, instead of their own.
        tell: is called with what is measured next.
    """
    how = how._replace(compiled=how.compiled and compiler() is not None)
    report: Report = {"machine": machine(), "how": how._asdict()}
    for name in suites:
        tell(name)
        if name in BY_SETTING:
            measure, own = BY_SETTING[name]
            report[name] = by_setting(name, partial(measure, how), settings or own, tell)
        else:
            report[name] = SUITES[name](how)
    return report


def by_setting(
    what: str, measure: Callable[[str], Report], settings: Iterable[str], tell: Callable[[str], Any] = lambda _: None
) -> Report:
    """What is measured at every setting; at the published sizes only if there is a CUDA device."""
    report: Report = {}
    for name in settings:
        tell(f"{what} of {name}")
        report[name] = measure(name) if name in SETTINGS or torch.cuda.is_available() else NOT_RUN
    return report


def steps(how: How, name: str) -> Report:
    """Training steps of a setting, ours and others'."""
    if name in CUDA_SETTINGS:
        return _with_largest_batch(CUDA_SETTINGS[name], _cuda_methods(name), how)
    methods = [Method(kind, precision) for kind, precision in product(KINDS, PRECISIONS)]
    methods += [Method("ours", "bfloat16", True), Method("naive", "float32", True), Method("naive", "bfloat16", True)]
    return compare(SETTINGS[name], methods, how)


def compare(setting: Setting, methods: list[Method], how: How, device: str = "cpu") -> Report:
    """Seconds, tokens per second, FLOPs and memory of every method, and the ratios of ours to the others."""
    torch.compiler.reset()  # or it would compile for dynamic shapes, because the last setting had other sizes
    runs, peaks = {}, {}
    for method in methods:
        if how.compiled or not method.compiled:
            runs[method], peaks[method] = _step_and_peak(method, setting, device)
    times = in_turn(runs, how)
    rates = {precision: matrix_rate(precision, how, device) for precision in PRECISIONS}
    flops = {kind: _flops_per_token(kind, setting) for kind in {method.kind for method in runs}}
    rows = {}
    for method, values in times.items():
        middle, spent = spread(values)["median"], flops[method.kind]
        rows[str(method)] = {
            "seconds": spread(values),
            "tokens_per_second": setting.tokens / middle,
            "ms_per_fast_step": 1000 * middle / (setting.steps + 1),
            "flops_per_token": spent,
            "of_matrix_rate": spent * setting.tokens / middle / rates[method.precision],
            "peak_bytes": peaks[method],
        }
    return {"setting": setting._asdict(), "matrix_rate": rates, "methods": rows, "ratios": _ratios(rows, times)}


class NoModules(nullcontext[None]):
    """Instead of torch's tracker of modules, which cannot follow `torch.autograd.grad` to parameters."""

    parents = ("Global",)


def _flops_per_token(kind: Kind, setting: Setting) -> float:
    """Counted on a CPU, on one sequence with one and with two fast steps; all others cost as much as the second.

    On a CPU nothing is compiled, and attention consists of products that torch counts.
    """
    runs = [make_step(Method(kind, "float32"), setting._replace(batch=1, steps=steps)) for steps in (1, 2)]
    one, two = (_flops(run) / setting.length for run in runs)
    return one + (setting.steps - 1) * (two - one)


def _flops(run: Callable[[], Any]) -> float:
    run()  # what is done once, at the first call, must not count
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return float(counter.get_total_flops())


def _step_and_peak(method: Method, setting: Setting, device: str) -> tuple[Callable[[], None], int]:
    """A training step, and the peak memory of the second one: the first allocates the optimiser's moments."""
    if device == "cpu":
        return make_step(method, setting), peak_bytes(_two_steps, method, setting)
    before = torch.cuda.memory_allocated()
    step = make_step(method, setting, device)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, torch.cuda.max_memory_allocated() - before


def _two_steps(method: Method, setting: Setting) -> None:
    step = make_step(method, setting)
    step()
    step()


def _ratios(rows: Report, times: Mapping[Method, list[float]]) -> Report:
    """Ours against the published structure, each at its own best precision, and against ours without Pyro.

    Throughput has three figures: nothing compiled, ours compiled if that is faster, and both if it is.
    """
    eager = {name: row for name, row in rows.items() if not name.endswith("compiled")}
    ours, naive = _best(eager, "ours"), _best(eager, "naive")
    return {
        "throughput_over_naive": {
            "eager": _median(naive) / _median(ours),
            "ours compiled": _median(naive) / _median(_best(rows, "ours")),
            "both compiled": _median(_best(rows, "naive")) / _median(_best(rows, "ours")),
        },
        "memory_of_naive": ours["peak_bytes"] / naive["peak_bytes"],
        "pyro_costs": {
            bare.precision: _excess(times[bare._replace(kind="ours")], values)
            for bare, values in times.items()
            if bare.kind == "handwritten"
        },
    }


def _excess(ours: list[float], bare: list[float]) -> dict[str, float]:
    """How much longer ours take: a small difference, so it is taken round by round."""
    return median_interval([a / b - 1 for a, b in zip(ours, bare, strict=True)])


def _best(rows: Report, kind: str) -> Report:
    return min((row for name, row in rows.items() if name.startswith(kind)), key=_median)


def _median(row: Report) -> float:
    return row["seconds"]["median"]


def _cuda_methods(name: str) -> list[Method]:
    """Ours and naive, eager and compiled; and every attention that runs here, or replayed CUDA graphs."""
    naive = [Method("naive", "bfloat16", compiled) for compiled in (False, True)]
    if name == "cuda-graph":
        choices = product((False, True), (False, True))
        return [Method("ours", "bfloat16", compiled, graph=graph) for compiled, graph in choices] + naive
    ours = [Method("ours", "bfloat16", compiled) for compiled in (False, True)]
    if name == "cuda-small":
        chosen = [x for x in ATTENTIONS if _usable(x, CUDA_SETTINGS[name])]
        ours[:1] = [Method("ours", "bfloat16", attention=x) for x in chosen]
    return ours + naive


def _with_largest_batch(setting: Setting, methods: list[Method], how: How) -> Report:
    """The comparison with the largest batch that all methods have room for."""
    while True:
        with suppress(torch.cuda.OutOfMemoryError):
            return compare(setting, methods, how, "cuda")
        gc.collect()  # what the failed attempt allocated
        torch.cuda.empty_cache()
        setting = setting._replace(batch=setting.batch // 2)


def _usable(attention: str, setting: Setting) -> bool:
    try:
        backend(attention, "cuda", torch.bfloat16, setting.width // setting.heads, setting.window)
    except ValueError:
        return False
    return True


def pyro(how: How, name: str) -> Report:
    """What Pyro costs a training step; over many rounds, because it is little."""
    many, device = how._replace(rounds=20 * how.rounds), "cpu" if name in SETTINGS else "cuda"
    runs = {kind: make_step(Method(kind, "bfloat16"), (SETTINGS | CUDA_SETTINGS)[name], device) for kind in KINDS[:2]}
    times = in_turn(runs, many)
    return {
        "rounds": many.rounds,
        "seconds": {kind: spread(values) for kind, values in times.items()},
        "pyro_costs": _excess(times["ours"], times["handwritten"]),
    }


def attention(how: How) -> Report:
    """Time of the windowed attention, forward and backward, at fixed W: t ∝ T^exponent, fitted; dense beside it."""
    device, window, lengths = "cuda" if torch.cuda.is_available() else "cpu", 64, (256, 512, 1024, 2048, 4096)
    chosen = backend("auto", device, torch.float32, 32, window)
    runs = {
        (name, length): partial(_attend, name, length, window, device)
        for name in (chosen, "dense")
        for length in lengths
    }
    times = in_turn(runs, how)
    report: Report = {}
    for name in (chosen, "dense"):
        medians = {length: spread(times[name, length])["median"] for length in lengths}
        report[name] = {"seconds": medians, "exponent": exponent(medians)}
    return {"window": window, "device": device, "backends": report}


def _attend(name: str, length: int, window: int, device: str) -> None:
    q, k, v = (torch.randn(4, 4, length, 32, device=device, requires_grad=True) for _ in range(3))
    torch.autograd.grad(BACKENDS[name](q, k, v, window).sum(), (q, k, v))
    if device == "cuda":
        torch.cuda.synchronize()


def exponent(values: dict[int, float]) -> float:
    """The slope of log value over log size, by least squares."""
    x, y = ([math.log(v) for v in side] for side in (values.keys(), values.values()))
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def sweeps(how: How) -> Report:
    """Seconds per training step of ours and the published structure as one size grows and the others stay."""
    methods = [Method("ours", "bfloat16", how.compiled), Method("naive", "bfloat16")]
    return {
        name: {size: _medians(SWEEP_BASE._replace(**{name: size}), methods, how) for size in sizes}
        for name, sizes in SWEEPS.items()
    }


def _medians(setting: Setting, methods: list[Method], how: How) -> dict[str, float]:
    times = in_turn({str(method): make_step(method, setting) for method in methods}, how)
    return {name: spread(values)["median"] for name, values in times.items()}


BY_SETTING: dict[str, tuple[Callable[[How, str], Report], tuple[str, ...]]] = {
    "steps": (steps, ALL_SETTINGS),
    "pyro": (pyro, ("tiny",)),  # where it is the largest share of a step
}
SUITES: dict[str, Callable[[How], Report]] = {
    "attention": attention,
    "generation": generation,
    "sweeps": sweeps,
    "head": head,
}
