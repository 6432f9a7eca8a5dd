"""What `ltm bench` runs: training steps side by side, attention against length, generation with and without cache."""

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.models import Decoder
from ltm_pyro.nn.attention import BACKENDS, backend
from ltm_pyro.studies.bench.clock import (
    How,
    compiler,
    in_turn,
    machine,
    matrix_rate,
    median_interval,
    peak_bytes,
    seconds,
    spread,
)
from ltm_pyro.studies.bench.head import head
from ltm_pyro.studies.bench.methods import Attention, Kind, Method, Precision, make
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
    """The report of some of the `SUITES`, behind a description of the machine.

    Args:
        settings: those that `steps` and `pyro` measure, instead of their own choice.
        tell: is given what is measured next.
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
    """What is measured at every setting; the published sizes where there is a CUDA device."""
    report: Report = {}
    for name in settings:
        tell(f"{what} of {name}")
        report[name] = measure(name) if name in SETTINGS or torch.cuda.is_available() else NOT_RUN
    return report


def steps(how: How, name: str) -> Report:
    """Training steps of a setting, ours and others'."""
    if name in CUDA_SETTINGS:
        return _fitting(CUDA_SETTINGS[name], _cuda_methods(name), how)
    methods = [Method(kind, precision) for kind, precision in product(KINDS, PRECISIONS)]
    methods += [Method("ours", "bfloat16", True), Method("naive", "float32", True), Method("naive", "bfloat16", True)]
    return compare(SETTINGS[name], methods, how)


def compare(setting: Setting, methods: list[Method], how: How, device: str = "cpu") -> Report:
    """Seconds, tokens per second, FLOPs and memory of every method, and how ours stand to the others."""
    torch.compiler.reset()  # or the compiler would make what it compiled for the last setting fit any size
    runs, peaks = {}, {}
    for method in methods:
        if how.compiled or not method.compiled:
            runs[method], peaks[method] = _made(method, setting, device)
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
    """Counted on a CPU, on one sequence and up to two fast steps, of which all others are copies.

    There nothing is compiled, and attention consists of products that torch counts.
    """
    runs = [make(Method(kind, "float32"), setting._replace(batch=1, steps=steps)) for steps in (1, 2)]
    one, two = (_flops(run) / setting.length for run in runs)
    return one + (setting.steps - 1) * (two - one)


def _flops(run: Callable[[], Any]) -> float:
    run()  # what is tried out once shall not count
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return float(counter.get_total_flops())


def _made(method: Method, setting: Setting, device: str) -> tuple[Callable[[], None], int]:
    """A training step, and the memory that the second one takes: the optimiser has its moments only from there on."""
    if device == "cpu":
        return make(method, setting), peak_bytes(_two_steps, method, setting)
    before = torch.cuda.memory_allocated()
    step = make(method, setting, device)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, torch.cuda.max_memory_allocated() - before


def _two_steps(method: Method, setting: Setting) -> None:
    step = make(method, setting)
    step()
    step()


def _ratios(rows: Report, times: Mapping[Method, list[float]]) -> Report:
    """Ours against the published structure, each at its own best precision, and against ours without Pyro.

    Throughput stands in three lines: nothing compiled, ours compiled where that is faster, and both where it is.
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
    """How much longer ours take: a small difference, taken round by round."""
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


def _fitting(setting: Setting, methods: list[Method], how: How) -> Report:
    """The comparison with the largest batch that all methods have room for."""
    while True:
        with suppress(torch.cuda.OutOfMemoryError):
            return compare(setting, methods, how, "cuda")
        gc.collect()  # what the failed try held
        torch.cuda.empty_cache()
        setting = setting._replace(batch=setting.batch // 2)


def _usable(attention: str, setting: Setting) -> bool:
    try:
        backend(attention, "cuda", torch.bfloat16, setting.width // setting.heads, setting.window)
    except ValueError:
        return False
    return True


def pyro(how: How, name: str) -> Report:
    """What Pyro costs a training step: of many rounds, for it is little."""
    many, device = how._replace(rounds=20 * how.rounds), "cpu" if name in SETTINGS else "cuda"
    runs = {kind: make(Method(kind, "bfloat16"), (SETTINGS | CUDA_SETTINGS)[name], device) for kind in KINDS[:2]}
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


def generation(how: How) -> Report:
    """512 greedy tokens of a model of T = 1,024, from nothing and up to its end, by one text and by eight at a time."""
    torch.manual_seed(0)
    decoder = Decoder(vocabulary=8192, layers=3, width=256, heads=4, thoughts=8, window=64, length=1024)
    with torch.no_grad():
        decoder.embedding.weight.mul_(0.3)  # or every token would follow itself
        return {
            f"{size} at a time behind {prompt} tokens": _generation(decoder, size, prompt, how)
            for size, prompt in product((1, 8), (1, 512))
        }


def _generation(decoder: Decoder, size: int, prompt: int, how: How, tokens: int = 512) -> Report:
    """With the cache, where it is asked for with the cache and compiled, and without."""
    z_BLKD = torch.randn(size, *decoder.thought_shape)
    start_BT = torch.randint(decoder.vocabulary, (size, prompt))
    anew, slow = _write(decoder, z_BLKD, start_BT, tokens, how, cached=False)
    report: Report = {"uncached": {"tokens_per_second": size * tokens / sum(slow)}}
    for compiled in (False, True) if how.compiled else (False,):
        _write(decoder, z_BLKD, start_BT, 16, how, cached=True, compiled=compiled)
        runs = [_write(decoder, z_BLKD, start_BT, tokens, how, True, compiled) for _ in range(how.rounds)]
        report["cached, compiled" if compiled else "cached"] = _against(anew, sum(slow), runs)
    return report


def _against(anew: Tensor, slow: float, runs: list[tuple[Tensor, list[float]]]) -> Report:
    """How the time of the 500th token stands to the 50th's: medians over 20 neighbours and all rounds."""
    fast = statistics.median(sum(times) for _, times in runs)
    early, late = (statistics.median(t for _, times in runs for t in times[n - 10 : n + 10]) for n in (50, 500))
    return {
        "tokens_per_second": len(anew) * len(runs[0][1]) / fast,
        "over_uncached": slow / fast,
        "500th_over_50th": late / early,
        "identical": torch.equal(runs[0][0], anew),
    }


def _write(
    decoder: Decoder, z_BLKD: Tensor, start_BT: Tensor, tokens: int, how: How, cached: bool, compiled: bool = False
) -> tuple[Tensor, list[float]]:
    """The greedy texts behind their start, and every token's seconds; the first one's are the start's as well."""
    text, cache, times = [start_BT], decoder.init_cache(z_BLKD), []

    def one() -> None:
        if cached:
            hidden_BD = decoder.decode_step(text[-1], cache, compile=compiled)
        else:
            hidden_BD = decoder(decoder.stem(torch.cat(text, 1)), z_BLKD)[:, -1]
        text.append(decoder.logits(hidden_BD).argmax(-1, keepdim=True))

    for _ in range(tokens):
        times.append(seconds(one, how))
    return torch.cat(text, 1), times


def sweeps(how: How) -> Report:
    """Seconds per training step of ours and the published structure as one size grows, the others at their base."""
    methods = [Method("ours", "bfloat16", how.compiled), Method("naive", "bfloat16")]
    return {
        name: {size: _medians(SWEEP_BASE._replace(**{name: size}), methods, how) for size in sizes}
        for name, sizes in SWEEPS.items()
    }


def _medians(setting: Setting, methods: list[Method], how: How) -> dict[str, float]:
    times = in_turn({str(method): make(method, setting) for method in methods}, how)
    return {name: spread(values)["median"] for name, values in times.items()}


BY_SETTING: dict[str, tuple[Callable[[How, str], Report], tuple[str, ...]]] = {
    "steps": (steps, ALL_SETTINGS),
    "pyro": (pyro, ("tiny",)),  # where a step does the least beside it
}
SUITES: dict[str, Callable[[How], Report]] = {
    "attention": attention,
    "generation": generation,
    "sweeps": sweeps,
    "head": head,
}
