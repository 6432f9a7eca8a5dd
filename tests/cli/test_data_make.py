"""`ltm data make`: a pack of a task by one command, its table and options, what it refuses, and how it is scored."""

import json
import sys

import pytest

from ltm_pyro.data.tasks import TASKS, Permutation

SMALL = ("--symbols", 4, "--pairs", 4, "--sequences", 300)
MINE = '''
from ltm_pyro.data.tasks import Task


class Constant(Task):
    """x_t = value, 100 % of the time.

    Args:
        value: the number
        loud: whether to say so
    """

    def __init__(self, value: int = 1, loud: bool = False) -> None:
        self.vocabulary, self.length = 5, 3
        self.value = value

    def sample(self, count, rng):
        import numpy as np

        return np.full((count, 3), self.value)

    def nats(self, tokens_NT, reach=None):
        return 0.0 * tokens_NT


def untyped(value=1):
    return Constant()


def no_task(value: int = 1):
    return value


def taken(out: str = "x"):
    return Constant()


def unknown(value: "Nowhere" = 1):
    return Constant()


builtin = dict
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file with tasks of one's own; its module is gone after the test."""
    path = tmp_path / "tasks_of_mine.py"
    path.write_text(MINE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield path
    sys.modules.pop("tasks_of_mine", None)


def test_a_task_is_made_shown_and_verified(ltm, tmp_path):
    out = tmp_path / "pack"
    fractions = ("--val-fraction", 0.3, "--test-fraction", 0.1, "--seed", 3)
    made = json.loads(ltm("data", "make", "permutation", "--out", out, *SMALL, *fractions, "--json")[1])
    assert made["task"] == {"name": "permutation", "options": {"symbols": 4, "pairs": 4}}
    assert (made["sequences"], made["seq_len"], made["rows"], made["exact"]) == (300, 8, "documents", True)
    assert [*made["nats"]] == ["knowing nothing", "best within 3", "best within 7", "optimum"]
    exact, _ = Permutation(4, 4).best_within(None)
    optimum = made["nats"]["optimum"]
    assert optimum["nats"] == pytest.approx(exact, abs=5 * optimum["stderr"])
    assert optimum["per_token"] == optimum["nats"] / 8
    assert "task permutation (symbols 4, pairs 4)" in " ".join(ltm("data", "show", out)[1].split())
    assert ltm("data", "verify", out)[0] == 0


def test_the_table_has_a_line_for_what_is_known(ltm, tmp_path):
    code, out, err = ltm("data", "make", "--out", tmp_path / "a", "permutation", *SMALL, "--reach", "5,1")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0].strip() for line in out.splitlines()[-4:]] == [
        "knowing nothing",
        "best within 1",
        "best within 5",
        "optimum",
    ]


def test_problems_are_made_shown_and_verified(ltm, tmp_path):
    command = ("data", "make", "word-problems", "--out", tmp_path / "a", "--sequences", 200, "--harder", 5, "--json")
    made = json.loads(ltm(*command)[1])
    assert made["task"]["options"] == {"easiest": 1, "hardest": 4, "harder": 5, "largest": 20}
    assert made["splits"]["harder"]["documents"] == 4
    code, out, _ = ltm("data", "show", tmp_path / "a", "--split", "harder", "--samples", 1)
    assert code == 0
    assert "difficulty: 5" in out
    assert ltm("data", "verify", tmp_path / "a")[0] == 0
    code, out, _ = ltm(*command[:-1], "--force")
    assert "problems of at most" in " ".join(out.split())


def test_help_is_that_of_the_task(ltm):
    code, out, _ = ltm("data", "make", "markov", "--help")
    assert code == 0
    assert "concentration of the rows" in out
    assert "(default: 0.3)" in out
    assert "--pairs" not in out


def test_a_pack_is_replaced_only_if_asked_to(ltm, refused, tmp_path):
    command = ("data", "make", "copy", "--out", tmp_path / "a", "--sequences", 20)
    assert ltm(*command)[0] == 0
    assert "already holds a pack" in refused(*command)
    assert ltm(*command, "--force", "--string", 3)[0] == 0


def test_an_output_that_is_there_is_refused_before_anything_is_drawn(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["copy"], "sample", lambda *_: pytest.fail("drawn"))
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "manifest.json").touch()
    (tmp_path / "file").touch()
    for out, message in {
        "pack": "already holds a pack; give --force",
        "file": "is a file, which even --force does not replace",
        "file/new": "is no folder or is read-only: choose another --out",
        300 * "n": "File name too long",
    }.items():
        assert message in refused("data", "make", "copy", "--out", tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pack"]


def test_a_task_of_ones_own_is_named_by_its_file(ltm, mine, tmp_path):
    options = ("--value", 4, "--loud", "--sequences", 9, "--val-fraction", 0, "--test-fraction", 0)
    made = ltm("data", "make", f"{mine}:Constant", "--out", tmp_path / "a", *options, "--json")
    assert json.loads(made[1])["task"] == {"name": "Constant", "options": {"value": 4, "loud": True}}
    assert "100 % of the time" in ltm("data", "make", f"{mine}:Constant", "--help")[1]
    mine.unlink()  # the pack is data: nothing is looked for
    assert ltm("data", "verify", tmp_path / "a")[0] == 0


def test_what_is_wrong_is_said_in_one_sentence(refused, mine, tmp_path):
    out, ends = ("--out", tmp_path / "new"), tmp_path / "ends_at_once.py"
    ends.write_text("raise SystemExit(7)")
    for given, message in {
        ("nothing", *out): "There is no task 'nothing': choose arithmetic, copy, markov,",
        ("copy",): "required: --out",
        ("copy", *out, "--symbols", "x"): "'x' is not a whole number",
        ("copy", *out, "--symbols", "-1"): "The task copy has --symbols -1: give a number from 1 to 100000.",
        ("copy", *out, "--alpha", 1): "unrecognized arguments: --alpha",
        ("markov", *out, "--alpha", "nan"): "'nan' is not a finite number",
        ("markov", *out, "--reach", 20): "ask for at most 8",
        ("sorting", *out, "--reach", "3"): "sorting is of problems, of which no best within --reach is known: leave",
        ("sorting", *out, "--largest", 4): "The task sorting has --hardest 6: give a number from 2 to 5.",
        ("copy", *out, "--reach", "1,,2"): "'' is not a whole number of at least 1",
        ("copy", *out, "--val-fraction", 2): "2.0",
        (f"{mine}:Missing", *out): "has no class or function 'Missing'",
        (f"{mine}:untyped", *out): "annotate it as int, float, bool, str or a Literal",
        (f"{mine}:no_task", *out): "gives int, which is no Task",
        (f"{mine}:taken", *out): "an argument 'out', which is an option of every task: rename it",
        (f"{mine}:unknown", *out): "The arguments of unknown cannot be read (name 'Nowhere' is not defined)",
        (f"{mine}:builtin", *out): "The arguments of builtin cannot be read",
        (f"{ends}:Task", *out): "cannot be imported (SystemExit: 7)",
        (f"{tmp_path}/gone.py:Task", *out): "is missing",
    }.items():
        assert message in refused("data", "make", *given)
    assert not (tmp_path / "new").exists()


def test_an_evaluation_says_what_is_best_within_the_reach_of_the_run(ltm, recipe, tmp_path):
    """Two layers of window 4 see 7 tokens; nobody is below the optimum by more than chance."""
    data = ("--out", tmp_path / "pack", *SMALL, "--reach", "3,7", "--val-fraction", 0.3)
    assert ltm("data", "make", "permutation", *data)[0] == 0
    assert ltm("fit", "--config", recipe, "--data.directory", tmp_path / "pack", "--run", tmp_path / "run")[0] == 0
    found = json.loads(ltm("evaluate", tmp_path / "run", "--estimators", "bound", "--json")[1])
    exact, bound = found["exact"], found["estimates"]["bound"]["nats_per_token"]
    assert found["reach"] == 7
    assert [*exact["best_within"]] == ["3", "7"]
    best = [exact["best_within"][r]["nats_per_token"] for r in "37"]
    assert best[0] > best[1] >= exact["rate"]["nats_per_token"]
    assert exact["beyond"]["bound"]["nats_per_token"] == pytest.approx(bound - best[1], abs=1e-6)
    lines = ltm("evaluate", tmp_path / "run", "--estimators", "bound")[1]
    assert "  - best within 7" in lines
    assert "- best within 3" not in lines
    assert "best within 3" in lines
    assert "A token of this run sees 7." in " ".join(lines.split())
