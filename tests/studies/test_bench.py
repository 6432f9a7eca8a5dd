"""The benchmark compares like with like, and says what it could not run."""

import json

import pytest
import torch

from ltm_pyro.cli.arguments import Parser
from ltm_pyro.cli.bench import add_arguments, run
from ltm_pyro.errors import UsageError
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.studies.bench import clock, suites
from ltm_pyro.studies.bench import head as heads
from ltm_pyro.studies.bench.clock import How, in_turn, median_interval, spread
from ltm_pyro.studies.bench.methods import Method, make_step
from ltm_pyro.studies.bench.naive import NaiveLTM
from ltm_pyro.studies.bench.settings import CUDA_SETTINGS, Setting

SETTING = Setting(width=16, layers=2, heads=2, vocabulary=50, length=12, window=4, thoughts=3, steps=2, batch=2)


@pytest.fixture(autouse=True)
def single_precision():
    """The benchmark measures what people train in."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def test_the_published_structure_is_the_same_model():
    naive = NaiveLTM(50, 2, 16, 2, 4, 12)
    ours = Decoder(50, 2, 16, 2, thoughts=3, window=4, length=12)
    assert sum(p.numel() for p in naive.parameters()) == sum(p.numel() for p in ours.parameters())
    inputs, targets, z = torch.randint(50, (2, 12)), torch.randint(50, (2, 12)), torch.randn(2, 2, 3, 16)
    x = naive.embedding(inputs).detach().requires_grad_()
    naive.embedding.forward = lambda _: x
    seen = torch.autograd.grad(naive(inputs, targets, z)[0], x)[0][0].abs().sum(-1) > 0
    assert seen.all()
    changed = inputs.clone()
    changed[:, -1] = (inputs[:, -1] + 1) % 50
    torch.testing.assert_close(naive(changed, targets, z), naive(inputs, targets, z))


@pytest.mark.parametrize("kind", ["ours", "handwritten", "naive"])
def test_every_method_takes_steps(kind):
    run = make_step(Method(kind, "float32"), SETTING)
    run()
    run()


def test_pyro_changes_no_number(monkeypatch):
    """Ours and the bare loop spend the same matrix products."""
    ours, bare = (suites._flops(make_step(Method(kind, "float32"), SETTING)) for kind in ("ours", "handwritten"))
    assert ours == pytest.approx(bare, rel=1e-3)
    assert suites._flops(make_step(Method("naive", "float32"), SETTING)) > 1.2 * ours


def test_flops_are_counted_on_few_steps_of_one_sequence():
    setting = SETTING._replace(steps=5, batch=3)
    for kind in ("ours", "naive"):
        whole = suites._flops(make_step(Method(kind, "float32"), setting)) / setting.tokens
        assert suites._flops_per_token(kind, setting) == pytest.approx(whole)


def test_rows_and_ratios(monkeypatch):
    monkeypatch.setattr(suites, "peak_bytes", lambda work, method, setting: 100 if method.kind == "ours" else 400)
    monkeypatch.setattr(suites, "matrix_rate", lambda *_: 1e12)
    methods = [Method(k, "float32") for k in ("ours", "handwritten", "naive")]
    report = suites.compare(SETTING, [*methods, Method("ours", "float32", compiled=True)], How(rounds=1))
    assert list(report["methods"]) == [str(method) for method in methods]  # nothing is compiled unasked
    assert len(set(report["ratios"]["throughput_over_naive"].values())) == 1
    assert report["ratios"]["memory_of_naive"] == 0.25
    assert set(report["ratios"]["pyro_costs"]) == {"float32"}
    row = report["methods"]["ours float32"]
    assert row["tokens_per_second"] == pytest.approx(SETTING.tokens / row["seconds"]["median"])
    json.dumps(report)


def test_what_pyro_costs_takes_many_rounds(monkeypatch):
    monkeypatch.setitem(suites.SETTINGS, "tiny", SETTING)
    told = []
    report = suites.bench(["pyro"], How(rounds=1), tell=told.append)["pyro"]["tiny"]
    assert told == ["pyro", "pyro of tiny"]
    assert report["rounds"] == 20
    assert report["pyro_costs"]["low"] <= report["pyro_costs"]["median"] <= report["pyro_costs"]["high"]
    assert set(report["seconds"]) == {"ours", "handwritten"}


def test_each_side_is_taken_at_its_best():
    seconds = {"ours bfloat16": 4, "ours bfloat16 compiled": 2, "naive float32": 9, "naive bfloat16": 8}
    seconds |= {"naive bfloat16 compiled": 5}
    rows = {name: {"seconds": {"median": x}, "peak_bytes": x} for name, x in seconds.items()}
    found = suites._ratios(rows, {})["throughput_over_naive"]
    assert found == {"eager": 2, "ours compiled": 4, "both compiled": 2.5}


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(clock.shutil, "which", lambda name: None)
    assert clock.compiler() is None
    assert "not run" in clock.machine()["compiler"]


def test_without_cuda_it_says_so(monkeypatch):
    monkeypatch.setattr(suites, "compare", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = suites.bench(["steps"], How())["steps"]
    assert report["cuda-small"] == report["cuda-large"] == "not run: no CUDA device"


def test_on_cuda_the_batch_shrinks_until_it_fits(monkeypatch):
    seen = []

    def compare(setting, methods, how, device):
        seen.append(setting.batch)
        if setting.batch > 16:
            raise torch.cuda.OutOfMemoryError
        return {str(method): {} for method in methods}

    monkeypatch.setattr(suites, "compare", compare)
    monkeypatch.setattr(suites, "_usable", lambda name, setting: name != "flex")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = suites.by_setting("steps", lambda name: suites.steps(How(), name), CUDA_SETTINGS)
    report = {name: set(rows) for name, rows in found.items()}
    assert seen == [64, 32, 16, 16, 8]
    both = {"ours bfloat16 compiled", "naive bfloat16", "naive bfloat16 compiled"}
    assert report["cuda-small"] == both | {"ours bfloat16 sdpa", "ours bfloat16 xformers"}
    assert report["cuda-large"] == both | {"ours bfloat16"}
    assert report["cuda-graph"] > report["cuda-large"] | {"ours bfloat16 graph"}


def test_tiles_are_tried_and_put_back(monkeypatch):
    monkeypatch.setattr(heads, "TOKENS", {"cpu": 32})
    monkeypatch.setattr(heads, "VOCABULARY", 50)
    monkeypatch.setattr(heads, "SIDES", {"cpu": ((8, 16), (8, 16))})
    monkeypatch.setattr(heads, "matrix_rate", lambda *_: 1e12)  # minutes without bfloat16 in hardware
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = dict(heads.TILES)
    report = suites.SUITES["head"](How(rounds=1))
    assert list(report["tiles"]) == ["8 x 8", "8 x 16", "16 x 8", "16 x 16"]
    assert all(row["of_matrix_rate"] > 0 for row in report["tiles"].values())
    assert before == heads.TILES


def test_exponent_and_spread():
    assert suites.exponent({n: 3.0 * n**1.5 for n in (1, 2, 8)}) == pytest.approx(1.5)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert median_interval([3.0, 1.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    draws = torch.randn(2000, 101)  # of median 0
    within = [found["low"] <= 0 <= found["high"] for found in map(median_interval, draws.tolist())]
    assert 0.94 < sum(within) / len(within) < 0.98
    calls = []
    in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, How(rounds=20))
    rounds = {"".join(calls[n : n + 2]) for n in range(0, len(calls), 2)}
    assert rounds == {"ab", "ba"}


@pytest.fixture
def parser():
    parser = Parser(prog="ltm bench")
    add_arguments(parser)
    return parser


def test_the_command_prints_one_object(parser, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(parser.parse_args(["steps", "--settings", "cuda-small", "--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == {"cuda-small": "not run: no CUDA device"}
    assert found["how"]["compiled"] == (clock.compiler() is not None)


def test_an_unknown_suite(parser):
    with pytest.raises(UsageError, match="no suite 'speed': choose from steps"):
        run(parser.parse_args(["speed"]))
    with pytest.raises(UsageError, match="at least 1, got 0"):
        run(parser.parse_args(["--rounds", "0"]))
