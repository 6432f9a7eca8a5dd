"""The tasks `arithmetic` and `modular`: a chain of operations, worked one after the other."""

from dataclasses import dataclass

from ltm_pyro.data.tasks.problem import OPERATIONS, Choices, ProblemTask, worked
from ltm_pyro.data.tasks.task import check_options, register_task


@register_task("arithmetic")
@dataclass
class Arithmetic(ProblemTask):
    """7+5-3? is answered by 7+5=12;12-3=9#9: sums and differences, one after the other, all results from 0 to 99.

    The difficulty is the number of steps. A step is uniform among + and - with a number from 1 to ``largest`` that keep
    the result in its range.

    Args:
        easiest: fewest steps
        hardest: most steps in training
        harder: most steps in the split `harder`
        largest: largest number of a question
    """

    easiest: int = 1
    hardest: int = 6
    harder: int = 9
    largest: int = 20

    def __post_init__(self) -> None:
        self.check_difficulties("arithmetic", 1, 100)
        check_options("arithmetic", largest=(self.largest, 1, 99))

    def write(self, difficulty: int, choices: Choices) -> tuple[str, str]:
        """A question of so many steps and its worked answer."""
        numbers = range(1, self.largest + 1)
        first = value = choices.of(numbers)
        steps = []
        for _ in range(difficulty):
            known = [(sign, n, OPERATIONS[sign](value, n)) for sign in "+-" for n in numbers]
            steps.append(choices.of([step for step in known if 0 <= step[2] <= 99]))
            value = steps[-1][2]
        return f"{first}{''.join(f'{sign}{n}' for sign, n, _ in steps)}?", worked(first, steps)


@register_task("modular")
@dataclass
class Modular(ProblemTask):
    """3*5+6? is answered by 3*5=1;1+6=0#0 modulo 7: sums, differences and products from left to right.

    The difficulty is the number of steps. Operations and numbers are uniform.

    Args:
        easiest: fewest steps
        hardest: most steps in training
        harder: most steps in the split `harder`
        modulus: numbers are from 0 to below it
    """

    easiest: int = 1
    hardest: int = 6
    harder: int = 9
    modulus: int = 11

    def __post_init__(self) -> None:
        self.check_difficulties("modular", 1, 100)
        check_options("modular", modulus=(self.modulus, 2, 100))

    def write(self, difficulty: int, choices: Choices) -> tuple[str, str]:
        """A question of so many steps and its worked answer."""
        first = value = choices.of(range(self.modulus))
        steps = []
        for _ in range(difficulty):
            sign, n = choices.of("+-*"), choices.of(range(self.modulus))
            value = OPERATIONS[sign](value, n) % self.modulus
            steps.append((sign, n, value))
        return f"{first}{''.join(f'{sign}{n}' for sign, n, _ in steps)}?", worked(first, steps)
