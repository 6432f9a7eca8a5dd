"""The tasks `arithmetic` and `modular`: a chain of operations, worked one after the other."""

from dataclasses import dataclass

from ltm_pyro.data.tasks.problem import ANSWER, Choices, ProblemTask
from ltm_pyro.data.tasks.task import check_options, register_task

_DO = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


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
        value = choices.of(numbers)
        question, steps = str(value), []
        for _ in range(difficulty):
            sign, number = choices.of([(s, n) for s in "+-" for n in numbers if 0 <= _DO[s](value, n) <= 99])
            question += f"{sign}{number}"
            steps.append(f"{value}{sign}{number}={_DO[sign](value, number)}")
            value = _DO[sign](value, number)
        return f"{question}?", f"{';'.join(steps)}{ANSWER}{value}"


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
        value = choices.of(range(self.modulus))
        question, steps = str(value), []
        for _ in range(difficulty):
            sign, number = choices.of("+-*"), choices.of(range(self.modulus))
            question += f"{sign}{number}"
            result = _DO[sign](value, number) % self.modulus
            steps.append(f"{value}{sign}{number}={result}")
            value = result
        return f"{question}?", f"{';'.join(steps)}{ANSWER}{value}"
