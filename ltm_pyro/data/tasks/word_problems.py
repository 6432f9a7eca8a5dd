"""The task `word-problems`: a story of a number of things, one sentence for each step."""

from dataclasses import dataclass

from ltm_pyro.data.tasks.problem import OPERATIONS, Choices, ProblemTask, worked
from ltm_pyro.data.tasks.task import check_options, register_task

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Lena", "Max")
THINGS = ("apples", "books", "coins", "flowers", "marbles", "pencils", "shells", "stamps", "stones", "tickets")
GAIN = ("{name} finds {n}.", "{name} buys {n}.", "{other} gives {name} {n}.")
LOSS = ("{name} loses {n}.", "{name} sells {n}.", "{name} gives {other} {n}.")
DOUBLE = ("Their number doubles.", "{name} gets as many again.")


@register_task("word-problems")
@dataclass
class WordProblems(ProblemTask):
    """Anna has 5 coins. Ben gives Anna 3. How many coins has Anna? is answered by 5+3=8#8.

    The difficulty is the number of steps. A step adds, takes away or doubles, and is uniform among the sentences and
    numbers from 1 to ``largest`` that keep the result from 0 to 99.

    Args:
        easiest: fewest steps
        hardest: most steps in training
        harder: most steps in the split `harder`
        largest: largest number of a question
    """

    easiest: int = 1
    hardest: int = 4
    harder: int = 6
    largest: int = 20

    def __post_init__(self) -> None:
        self.check_difficulties("word-problems", 1, 100)
        check_options("word-problems", largest=(self.largest, 1, 99))

    def write(self, difficulty: int, choices: Choices) -> tuple[str, str]:
        """A story of so many steps and its worked answer."""
        numbers = range(1, self.largest + 1)
        name, thing, first = choices.of(NAMES), choices.of(THINGS), choices.of(numbers)
        other = choices.of([x for x in NAMES if x != name])
        story, steps, value = [f"{name} and {other} have boxes. {name} has {first} {thing}."], [], first
        for _ in range(difficulty):
            known = [(sentence, "+", n) for sentence in GAIN for n in numbers if value + n <= 99]
            known += [(sentence, "-", n) for sentence in LOSS for n in numbers if value >= n]
            known += [(sentence, "*", 2) for sentence in DOUBLE if 1 <= value <= 49]
            sentence, sign, n = choices.of(known)
            story.append(sentence.format(name=name, other=other, n=n))
            value = OPERATIONS[sign](value, n)
            steps.append((sign, n, value))
        return f"{' '.join(story)} How many {thing} has {name}?", worked(first, steps)
