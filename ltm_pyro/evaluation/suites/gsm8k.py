"""Grade-school mathematics (GSM8K, arXiv 2110.14168): worked examples, n answers a question, pass@k."""

import json
import math
import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part, none_found
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.thoughts import ThoughtSampling

ANSWER_TOKENS = 128  # of the model's length, at most half of it
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


class Problem(NamedTuple):
    """A question and its worked answer, the result behind ``####``."""

    question: str
    answer: str


def parts(options: Options) -> list[Part]:
    """pass@1 and pass@5; the worked examples are the file's first, the questions those behind them."""
    place = options.found("gsm8k", "gsm8k*test*.jsonl", "gsm8k*.jsonl", "gsm8k/*test*.jsonl", "gsm8k/*.jsonl")
    if place is None:
        raise none_found("gsm8k", "gsm8k*.jsonl with `question` and `answer`", options)
    problems = read_problems(Path(place), None if options.limit is None else options.limit + options.shots)
    if len(problems) <= options.shots:
        raise UsageError(f"{place} has {len(problems)} problems, too few for {options.shots} examples and a question.")
    return [Part("gsm8k", partial(pass_at_k, problems, options))]


def read_problems(file: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSONL file; `UsageError` says which line is not one."""
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
        "".join(problem).encode()  # both are text, of whole characters
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{where} is not an object with "question" and "answer" ({error}): mend the line.') from None
    if result(problem.answer) is None:
        raise UsageError(f"{where} has no number in its answer: mend the line.")
    return problem


def pass_at_k(problems: list[Problem], options: Options, run: Run) -> Figures:
    """The share of questions that k answers solve, averaged over which k of the n it might have been."""
    n, room = options.attempts, min(ANSWER_TOKENS, run.length // 2)
    examples, asked = problems[: options.shots], problems[options.shots :]
    prompts = [prompt(run, examples, problem.question, room) for problem in asked]
    kept = [(text, result(problem.answer)) for text, problem in zip(prompts, asked, strict=True) if text]
    if not kept:
        raise UsageError(f"No question of GSM8K fits into {run.length - room} tokens: use a longer model.")
    sampling = Sampling(max_new_tokens=room, num_return_sequences=n, stop_strings=("Question:",), temperature=0.8)
    thought_sampling = ThoughtSampling(inference=options.inference(run))
    texts = generate(run, [text for text, _ in kept], sampling, thought_sampling, seed=options.seed)
    correct = [sum(result(text) == truth for text in texts[i * n : (i + 1) * n]) for i, (_, truth) in enumerate(kept)]
    figures: Figures = {}
    for k in {1, min(5, n)}:
        share = sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in correct) / len(correct)
        low, high = wilson(share, len(correct))
        figures |= {f"pass@{k}": share, f"pass@{k}_low": low, f"pass@{k}_high": high}
    shots = sum(text.count("Question:") - 1 for text, _ in kept) / len(kept)
    counts = {"questions": len(kept), "left_out": len(asked) - len(kept), "attempts": n, "shots": shots}
    return figures | counts | {"no_number": sum(result(text) is None for text in texts) / len(texts)}


def prompt(run: Run, examples: list[Problem], question: str, room: int) -> str | None:
    """As many worked examples as leave ``room`` tokens for the answer; None where the question alone does not."""
    for first in range(len(examples) + 1):
        shown = [f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in examples[first:]]
        text = "".join(shown) + f"Question: {question}\nAnswer:"
        if len(encode_prompt(run.tokenizer, text)) + room <= run.length:
            return text
    return None


def result(answer: str) -> float | None:
    """The first number behind ``####``, or else the last number of the text before another question begins."""
    own, marker, behind = answer.split("Question:")[0].partition("####")
    found = _NUMBER.findall(behind if marker else own)
    return float(found[0 if marker else -1].replace(",", "").replace("$", "")) if found else None


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion of n (Wilson 1927), which has a width even at 0."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))
