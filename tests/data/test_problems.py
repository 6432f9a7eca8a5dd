"""Problems: every step is right, their law is the one that is stated, and no question is in two splits."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.make import make_problems
from ltm_pyro.data.tasks import TASKS, Arithmetic, Choices, Modular, ProblemTask, Sorting, WordProblems
from ltm_pyro.data.tasks.problem import answer_of
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.reasoning import read_questions

OURS = [Arithmetic(), Arithmetic(largest=99), Modular(), Modular(modulus=2), Sorting(), WordProblems()]


def check_chain(task, prompt, completion, difficulty):
    """The steps follow from each other, each is right, and they are those of the question."""
    work, answer = completion.split("#")
    steps = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups() for step in work.split(";")]
    assert len(steps) == difficulty
    for before, (first, *_) in pairwise(steps):
        assert before[3] == first
    for first, sign, second, result in steps:
        value = eval(f"{first}{sign}{second}")
        assert (value % task.modulus if isinstance(task, Modular) else value) == int(result)
        assert 0 <= int(result) <= 99
    assert steps[-1][3] == answer
    if not isinstance(task, WordProblems):
        assert steps[0][0] + "".join(sign + number for _, sign, number, _ in steps) + "?" == prompt
        return
    sentences = [x.strip() for x in prompt.split(".")[2:-1]]
    name = re.search(r"has (\w+)\?", prompt)[1]
    for sentence, (_, sign, number, _) in zip(sentences, steps, strict=True):
        gets = re.search(rf"finds|buys|gives {name}|doubles|again", sentence)
        assert ("doubles" in sentence or "again" in sentence) == (sign == "*")
        assert bool(gets) == (sign != "-")
        assert sign == "*" or re.search(rf"\b{number}$", sentence)


def check_sorting(task, prompt, completion, difficulty):
    given, trace = [*map(int, prompt[:-1].split())], re.split("[;#]", completion)
    assert len({*given}) == len(given) == difficulty
    assert trace == [" ".join(map(str, sorted(given[:n]))) for n in range(1, difficulty + 1)]


def test_every_problem_task_is_tested():
    ours = {x for x in TASKS.values() if x.__module__.startswith("ltm_pyro.") and issubclass(x, ProblemTask)}
    assert {type(task) for task in OURS} == ours


@pytest.mark.parametrize("task", OURS, ids=str)
@given(seed=st.integers(0, 2**32), harder=st.booleans())
def test_every_worked_answer_is_right(task, seed, harder):
    check = check_sorting if isinstance(task, Sorting) else check_chain
    for problem in task.sample(5, np.random.default_rng(seed), harder):
        check(task, problem.prompt, problem.completion, problem.difficulty)
        low, high = (task.hardest + 1, task.harder) if harder else (task.easiest, task.hardest)
        assert low <= problem.difficulty <= high


class Walk(Choices):
    """Takes one branch after the other: all draws that are possible."""

    def __init__(self):
        self.path, self.sizes = [], []

    def next(self):
        """Goes to the next branch; whether there is one."""
        while self.path and self.path[-1] + 1 == self.sizes[-1]:
            self.path.pop()
            self.sizes.pop()
        if self.path:
            self.path[-1] += 1
        return bool(self.path)

    def begin(self):
        self.nats, self._at = 0.0, 0

    def of(self, options):
        if self._at == len(self.path):
            self.path.append(0)
            self.sizes.append(len(options))
        self.nats += math.log(len(options))
        self._at += 1
        return options[self.path[self._at - 1]]


@pytest.mark.parametrize(
    "task",
    [
        Arithmetic(1, 2, 2, largest=4),
        Modular(1, 2, 2, modulus=3),
        Sorting(1, 3, 3, largest=4),
        WordProblems(1, 1, 1, largest=3),
    ],
    ids=str,
)
def test_the_law_is_the_one_that_is_stated(task):
    """No two ways of drawing give one text, and all probabilities add up to 1."""
    found = {}
    for difficulty in range(task.easiest, task.hardest + 1):
        walk = Walk()
        while True:
            walk.begin()
            text = "".join(task.write(difficulty, walk))
            assert text not in found
            found[text] = walk.nats + math.log(task.hardest - task.easiest + 1)
            if not walk.next():
                break
    assert sum(math.exp(-nats) for nats in found.values()) == pytest.approx(1, abs=1e-9)
    drawn = task.sample(300, np.random.default_rng(0))
    assert [x.nats for x in drawn] == pytest.approx([found[x.prompt + x.completion] for x in drawn])


def test_no_question_is_in_two_splits_and_harder_ones_are_apart(tmp_path):
    task = Arithmetic(1, 3, 5, largest=9)
    manifest = make_problems(task, tmp_path / "pack", 600, val_fraction=0.1, test_fraction=0.1)
    questions = {split: read_questions(tmp_path / "pack", split) for split in ("train", "val", "test", "harder")}
    prompts = {split: {x.prompt for x in found} for split, found in questions.items()}
    for first in prompts:
        assert not any(prompts[first] & prompts[other] for other in prompts if other != first)
    assert {x.difficulty for x in questions["harder"]} == {4, 5}
    assert {x.difficulty for x in questions["train"]} == {1, 2, 3}
    assert manifest.splits["harder"].documents == 60
    assert manifest.prompts == 660
    for question in questions["test"]:
        assert str(eval(question.prompt[:-1])) == question.answer  # no products, so from left to right
    row = next(iter(PackedDataset.open(tmp_path / "pack", "test")))
    tokens = PackedDataset.open(tmp_path / "pack", "test").tokenizer
    assert tokens.decode(row.tokens_T[: row.prompt].tolist()).endswith("?")
    assert row.bytes == len(tokens.decode(row.tokens_T.tolist()))
    assert len(read_questions(tmp_path / "pack", "train", limit=7)) == 7


@pytest.mark.parametrize("name", ["arithmetic", "word-problems", "sorting"])
def test_a_number_is_one_token(name, tmp_path):
    make_problems(TASKS[name](), tmp_path / "pack", 300)
    tokenizer = PackedDataset.open(tmp_path / "pack", "train").tokenizer
    assert [n for n in range(100) if len(tokenizer.encode(f"={n}").ids) != 2] == []
    assert [n for n in range(100) if len(tokenizer.encode(f"={n} {n}").ids) != 3] == []


def test_a_task_without_harder_problems_has_no_such_split(tmp_path):
    manifest = make_problems(Modular(1, 2, 2), tmp_path / "pack", 100)
    assert "harder" not in manifest.splits
    assert "harder" not in make_problems(Modular(1, 2, 3), tmp_path / "none", 100, test_fraction=0).splits
    with pytest.raises(UsageError, match=r"no split 'harder': choose train or val or test\."):
        manifest.split("harder", "pack")


def test_difficulties_are_checked():
    with pytest.raises(UsageError, match="arithmetic has --hardest 1: give a number from 2 to 100"):
        Arithmetic(easiest=2, hardest=1)
    with pytest.raises(UsageError, match="sorting has --harder 9: give a number from 2 to 5"):
        Sorting(hardest=2, harder=9, largest=4)


def test_the_answer_is_what_stands_last():
    assert [answer_of(x) for x in ("1+1=2#2", "#1 # 3 4 ", "7", "#")] == ["2", "3 4", None, ""]
