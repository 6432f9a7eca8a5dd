"""Tasks: sequences of numbers whose optimum is known, and problems with worked answers."""

from ltm_pyro.data.tasks.arithmetic import Arithmetic, Modular
from ltm_pyro.data.tasks.copy import Copy
from ltm_pyro.data.tasks.markov import Markov
from ltm_pyro.data.tasks.permutation import Permutation
from ltm_pyro.data.tasks.problem import Choices, Problem, ProblemTask
from ltm_pyro.data.tasks.recall import Recall
from ltm_pyro.data.tasks.regression import Regression
from ltm_pyro.data.tasks.sorting import Sorting
from ltm_pyro.data.tasks.task import TASKS, Task, register_task
from ltm_pyro.data.tasks.topics import Topics
from ltm_pyro.data.tasks.word_problems import WordProblems

__all__ = [
    "TASKS",
    "Arithmetic",
    "Choices",
    "Copy",
    "Markov",
    "Modular",
    "Permutation",
    "Problem",
    "ProblemTask",
    "Recall",
    "Regression",
    "Sorting",
    "Task",
    "Topics",
    "WordProblems",
    "register_task",
]
