"""The task `sorting`: numbers, and their order found by insertion."""

from bisect import insort
from dataclasses import dataclass

from ltm_pyro.data.tasks.problem import ANSWER, Choices, ProblemTask
from ltm_pyro.data.tasks.task import check_options, register_task


@register_task("sorting")
@dataclass
class Sorting(ProblemTask):
    """52 17 88? is answered by 52;17 52#17 52 88: one number after the other is put into its place.

    The difficulty is how many numbers there are, all different, each uniform among those from 0 to ``largest`` that are
    left.

    Args:
        easiest: fewest numbers
        hardest: most numbers in training
        harder: most numbers in the split `harder`
        largest: largest number
    """

    easiest: int = 2
    hardest: int = 6
    harder: int = 8
    largest: int = 99

    def __post_init__(self) -> None:
        check_options("sorting", largest=(self.largest, 1, 9_999))
        self.check_difficulties("sorting", 1, min(100, self.largest + 1))

    def write(self, difficulty: int, choices: Choices) -> tuple[str, str]:
        """So many numbers, and the prefixes of every length in order."""
        left, given, in_order, trace = [*range(self.largest + 1)], [], list[int](), []
        for _ in range(difficulty):
            number = choices.of(left)
            left.remove(number)
            given.append(number)
            insort(in_order, number)
            trace.append(" ".join(map(str, in_order)))
        return f"{' '.join(map(str, given))}?", f"{';'.join(trace[:-1])}{ANSWER}{trace[-1]}"
