"""Tasks whose optimum is known: sequences of numbers, each with its exact −log p(x) and the best within a reach."""

from ltm_pyro.data.tasks.copy import Copy
from ltm_pyro.data.tasks.markov import Markov
from ltm_pyro.data.tasks.permutation import Permutation
from ltm_pyro.data.tasks.recall import Recall
from ltm_pyro.data.tasks.regression import Regression
from ltm_pyro.data.tasks.task import TASKS, Task, register_task
from ltm_pyro.data.tasks.topics import Topics

__all__ = ["TASKS", "Copy", "Markov", "Permutation", "Recall", "Regression", "Task", "Topics", "register_task"]
