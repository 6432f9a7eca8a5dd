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
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Figures, Options, Part, no_data
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.thoughts import ThoughtSampling
from ltm_pyro.utils.statistics import wilson

ANSWER_TOKENS = 128  # at most half of the model's length
STOP = "Question:"  # where the next question begins
# the filters and the comparison of the task gsm8k, version 3, of lm-evaluation-harness 0.4.13, pattern by pattern
EXTRACT = {"strict": (r"#### (\-?[0-9\.\,]+)", 0), "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


class Problem(NamedTuple):
    """A question and its worked answer, which ends with ``#### RESULT``; ``line`` is that of the file."""

    question: str
    answer: str
    line: int = 0


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
            return [_problem(line, str(file), i) for i, line in enumerate(islice(lines, limit), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as text ({error}): give a JSONL file in UTF-8.") from None


def _problem(line: str, file: str, number: int) -> Problem:
    where = f"{file} line {number}"
    try:
        record = json.loads(line)
        problem = Problem(record["question"], record["answer"], number)
        "".join(problem[:2]).encode()  # fails unless both are text without lone surrogates
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{where} is not an object with "question" and "answer" ({error}): fix it.') from None
    if not re.fullmatch(r"-?[0-9.]+", result := as_compared(problem.answer)):
        raise UsageError(f"{where} has no number at the end of its answer, but {result[-40:]!r}: fix the line.")
    return problem


def pass_at_k(problems: list[Problem], options: Options, run: Run) -> Figures:
    """The unbiased estimate of pass@k from n answers per question (Chen et al. 2021, arXiv 2107.03374)."""
    n, room = options.attempts, min(ANSWER_TOKENS, run.length // 2)
    examples, asked = problems[: options.shots], problems[options.shots :]
    prompts = [build_prompt(run, examples, problem.question, room) for problem in asked]
    kept = [(text, problem) for text, problem in zip(prompts, asked, strict=True) if text]
    if not kept:
        raise UsageError(f"No question of GSM8K fits into {run.length - room} tokens: use a longer model.")
    sampling = Sampling(max_new_tokens=room, num_return_sequences=n, stop_strings=STOP, temperature=0.8)
    thought_sampling = ThoughtSampling(inference=options.inference(run))
    texts = generate(run, [text for text, _ in kept], sampling, thought_sampling, seed=options.seed)
    by_question: list[Figures] = []
    for first, (_, problem) in zip(range(0, len(texts), n), kept, strict=True):
        answers = [text.split(STOP)[0] for text in texts[first : first + n]]
        right = {way: sum(is_right(answer, problem.answer, way) for answer in answers) for way in EXTRACT}
        known = {"id": problem.line, "question": problem.question, "result": as_compared(problem.answer)}
        by_question.append({**known, "attempts": n, **right, "answers": answers})
    figures: Figures = {}
    for k in sorted({1, min(5, n)}):
        for way in EXTRACT:
            share = sum(1 - math.comb(n - c[way], k) / math.comb(n, k) for c in by_question) / len(kept)
            low, high = wilson(share, len(kept))
            figures |= {f"pass@{k}_{way}": share, f"pass@{k}_{way}_low": low, f"pass@{k}_{way}_high": high}
    shots = sum(text.count(STOP) - 1 for text, _ in kept) / len(kept)
    counts = {"questions": len(kept), "left_out": len(asked) - len(kept), "attempts": n, "shots": shots}
    without = sum(extract(answer, "flexible") is None for found in by_question for answer in found["answers"])
    return figures | counts | {"no_number": without / len(texts), BY_DOCUMENT: by_question}


def build_prompt(run: Run, examples: list[Problem], question: str, room: int) -> str | None:
    """The prompt with as many worked examples as leave ``room`` tokens; None if the question alone is too long."""
    for first in range(len(examples) + 1):
        shown = [f"{STOP} {p.question}\nAnswer: {p.answer}\n\n" for p in examples[first:]]
        text = "".join(shown) + f"{STOP} {question}\nAnswer:"
        if len(encode_prompt(run.tokenizer, text)) + room <= run.length:
            return text
    return None


def extract(answer: str, way: str) -> str | None:
    """The result in an answer, as the harness finds it: ``strict``, after ``#### ``, or ``flexible``, the last one."""
    pattern, which = EXTRACT[way]
    found = re.findall(pattern, answer)
    if not found:
        return None
    return (found[which] if isinstance(found[which], str) else "".join(found[which])).strip()


def as_compared(result: str) -> str:
    """A result, or a worked answer that ends with it, without what the harness does not compare."""
    for pattern in IGNORED:
        result = re.sub(pattern, "", result)
    return result.lower()


def is_right(answer: str, truth: str, way: str) -> bool:
    """Whether an answer's result is that of the worked answer ``truth``, character by character."""
    found = extract(answer, way)
    return found is not None and as_compared(found) == as_compared(truth)
