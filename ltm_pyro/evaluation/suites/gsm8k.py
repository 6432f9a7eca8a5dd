"""Grade-school mathematics (GSM8K, arXiv 2110.14168): few-shot prompts, n answers per question, pass@k."""

import json
import math
import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part, no_data
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.thoughts import ThoughtSampling

ANSWER_TOKENS = 128  # at most half of the model's length
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


class Problem(NamedTuple):
    """A question and its worked answer, which ends with ``#### RESULT``."""

    question: str
    answer: str


def parts(options: Options) -> list[Part]:
    """pass@1 and pass@5; the first problems of the file are the worked examples, the others the questions."""
    place = options.find("gsm8k", "gsm8k*test*.jsonl", "gsm8k*.jsonl", "gsm8k/*test*.jsonl", "gsm8k/*.jsonl")
    if place is None:
        raise no_data("gsm8k", "gsm8k*.jsonl with `question` and `answer`", options)
    problems = read_problems(Path(place), None if options.limit is None else options.limit + options.shots)
    if len(problems) <= options.shots:
        raise UsageError(f"{place} has {len(problems)} problems, too few for {options.shots} examples and a question.")
    return [Part("gsm8k", partial(pass_at_k, problems, options))]


def read_problems(file: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSONL file; `UsageError` names the first line that is not a problem."""
    try:
        with file.open(encoding="utf-8") as lines:
            return [
                _problem(line, f"{file} line {i}") for i, line in enumerate(islice(lines, limit), 1) if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as text ({error}): give a JSONL file in UTF-8.") from None


def _problem(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
        problem = Problem(record["question"], record["answer"])
        "".join(problem).encode()  # fails unless both are text without lone surrogates
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{where} is not an object with "question" and "answer" ({error}): fix it.') from None
    if extract_number(problem.answer) is None:
        raise UsageError(f"{where} has no number in its answer: fix the line.")
    return problem


def pass_at_k(problems: list[Problem], options: Options, run: Run) -> Figures:
    """The unbiased estimate of pass@k from n answers per question (Chen et al. 2021, arXiv 2107.03374)."""
    n, room = options.attempts, min(ANSWER_TOKENS, run.length // 2)
    examples, asked = problems[: options.shots], problems[options.shots :]
    prompts = [build_prompt(run, examples, problem.question, room) for problem in asked]
    kept = [(text, extract_number(problem.answer)) for text, problem in zip(prompts, asked, strict=True) if text]
    if not kept:
        raise UsageError(f"No question of GSM8K fits into {run.length - room} tokens: use a longer model.")
    sampling = Sampling(max_new_tokens=room, num_return_sequences=n, stop_strings=("Question:",), temperature=0.8)
    thought_sampling = ThoughtSampling(inference=options.inference(run))
    texts = generate(run, [text for text, _ in kept], sampling, thought_sampling, seed=options.seed)
    numbers = [extract_number(text) for text in texts]
    correct = [numbers[i * n : (i + 1) * n].count(truth) for i, (_, truth) in enumerate(kept)]
    figures: Figures = {}
    for k in {1, min(5, n)}:
        share = sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in correct) / len(correct)
        low, high = wilson(share, len(correct))
        figures |= {f"pass@{k}": share, f"pass@{k}_low": low, f"pass@{k}_high": high}
    shots = sum(text.count("Question:") - 1 for text, _ in kept) / len(kept)
    counts = {"questions": len(kept), "left_out": len(asked) - len(kept), "attempts": n, "shots": shots}
    return figures | counts | {"no_number": numbers.count(None) / len(texts)}


def build_prompt(run: Run, examples: list[Problem], question: str, room: int) -> str | None:
    """The prompt with as many worked examples as leave ``room`` tokens; None if the question alone is too long."""
    for first in range(len(examples) + 1):
        shown = [f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in examples[first:]]
        text = "".join(shown) + f"Question: {question}\nAnswer:"
        if len(encode_prompt(run.tokenizer, text)) + room <= run.length:
            return text
    return None


def extract_number(answer: str) -> float | None:
    """The first number after ``####``, or, without that mark, the last number before another question begins."""
    text, marker, after = answer.split("Question:")[0].partition("####")
    found = _NUMBER.findall(after if marker else text)
    return float(found[0 if marker else -1].replace(",", "").replace("$", "")) if found else None


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion of n (Wilson 1927); its width is above 0 also for a share of 0 or 1."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))
