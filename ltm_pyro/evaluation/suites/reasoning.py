"""Reasoning: right answers to the problems of a task, by one draft, several drafts and rethinking, beside their cost.

How many drafts or iterations each way takes is chosen on the split val, among those that cost no more FLOPs than the
largest vote, and reported on test and on harder problems. Shapes: Q questions, N drafts or iterations.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.data.make import DIFFICULTY
from ltm_pyro.data.manifest import MANIFEST, Manifest, is_pack, read_manifest
from ltm_pyro.data.tasks.problem import answer_of
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Figures, Options, Part, no_data
from ltm_pyro.runs.run import Run
from ltm_pyro.text.denoising import fills_gaps
from ltm_pyro.text.generation import generate
from ltm_pyro.text.rethinking import Rethinking, rethink
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score_tokens
from ltm_pyro.text.thoughts import ThoughtSampling
from ltm_pyro.training.flops import inference_flops
from ltm_pyro.utils.statistics import mcnemar, wilson

REPORTED = ("test", "harder")
VOTERS = 4  # chains of rethinking that vote
ONE, VOTE = "one draft", "majority"


class Question(NamedTuple):
    """A problem of a pack: its prompt, the right answer, its difficulty."""

    prompt: str
    answer: str
    difficulty: int


class Way(NamedTuple):
    """What N drafts or iterations give: whether each question is answered rightly, and the FLOPs of a question."""

    right_Q: Bool[np.ndarray, " Q"]
    flops: float


Ways = dict[str, dict[int, Way]]  # by name and N


def parts(options: Options) -> list[Part]:
    """A part for each pack of problems: those of `ltm data make` in the folder, or one that is named."""
    if given := (options.sources or {}).get("reasoning"):
        packs = [Path(given)]
        if not is_pack(given) or not _has_problems(read_manifest(given)):
            raise UsageError(f"{given} is no pack with prompts and the splits val and test: see `ltm data make`.")
    else:
        found = sorted(path.parent for path in options.folder.rglob(MANIFEST))
        packs = [x for x in found if (manifest := read_manifest(x)).task and _has_problems(manifest)]
    if not packs:
        raise no_data("reasoning", "packs of problems (`ltm data make arithmetic`)", options)
    names = (str(read_manifest(x).task.get("name", x.name)) for x in packs)  # somebody else's, perhaps
    plain = (re.sub(r"[^\w-]+", " ", name).strip()[:40] or "problems" for name in names)
    return [Part(name, partial(reasoning, x, options)) for name, x in zip(plain, packs, strict=True)]


def _has_problems(manifest: Manifest) -> bool:
    documents = manifest.dropped + sum(split.documents for split in manifest.splits.values())
    return manifest.prompts >= documents and {"val", "test"} <= manifest.splits.keys()


def read_questions(pack: Path, split: str, limit: int | None = None) -> list[Question]:
    """The different questions of a split; `UsageError` for one without an answer."""
    dataset, found = PackedDataset.open(pack, split), dict[str, Question]()
    for row in dataset:
        if len(found) == limit:
            break
        prompt, completion = (
            dataset.tokenizer.decode(x.tolist()) for x in (row.tokens_T[: row.prompt], row.tokens_T[row.prompt :])
        )
        if (answer := answer_of(completion)) is None:
            raise UsageError(f"{pack}: the worked answer {completion[:40]!r} has no '#' before its answer.")
        difficulty = row.parts[0].document.labels.get(DIFFICULTY)
        found[prompt] = Question(prompt, answer, int(difficulty) if isinstance(difficulty, int | float) else 0)
    return list(found.values())


def reasoning(pack: Path, options: Options, run: Run) -> Figures:
    """Accuracies with 95 % intervals (Wilson), and exact McNemar tests of rethinking against one draft and a vote."""
    if fills_gaps(run):
        raise UsageError("The suite reasoning needs texts that go on behind a prompt: give a run that is no diffusion.")
    manifest = read_manifest(pack)
    splits = {x: read_questions(pack, x, options.limit) for x in ("val", *REPORTED) if x in manifest.splits}
    room = run.length - max(len(encode_prompt(run.tokenizer, x.prompt)) for found in splits.values() for x in found)
    if room < 1:
        raise UsageError(f"The longest question fills the model's {run.length} tokens: use a longer model.")
    ways = {split: every_way(run, questions, options, room) for split, questions in splits.items()}
    most = ways["val"][VOTE][max(ways["val"][VOTE])].flops
    chosen = {}
    for name, known in ways["val"].items():
        affordable = {n: way for n, way in known.items() if way.flops <= most} or {min(known): known[min(known)]}
        best = max(way.right_Q.mean() for way in affordable.values())
        chosen[name] = min(n for n, way in affordable.items() if way.right_Q.mean() == best)
    over = [name for name, n in chosen.items() if ways["val"][name][n].flops > most]
    figures: Figures = {"chosen": chosen, "flops_of_the_vote": most, "over_budget": over}
    by_question: list[Figures] = []
    for split in REPORTED[: len(splits) - 1]:
        questions, found = splits[split], {name: ways[split][name][n] for name, n in chosen.items()}
        before = "" if split == "test" else f"{split}_"
        figures[f"{before}questions"] = len(questions)
        for name, way in found.items():
            low, high = wilson(float(way.right_Q.mean()), len(questions))
            key = before + name.replace(" ", "_")
            figures |= {
                key: float(way.right_Q.mean()),
                f"{key}_low": low,
                f"{key}_high": high,
                f"{key}_flops": way.flops,
            }
        for name in (x for x in found if x.startswith("rethinking")):
            for other in (ONE, VOTE):
                key = f"{before}{name}_above_{other}".replace(" ", "_")
                figures[key] = float(found[name].right_Q.mean() - found[other].right_Q.mean())
                figures[f"{key}_p"] = mcnemar(found[name].right_Q, found[other].right_Q)
        by_question += [
            {"id": q.prompt, "split": split, "answer": q.answer, "difficulty": q.difficulty}
            | {name: bool(way.right_Q[i]) for name, way in found.items()}
            for i, q in enumerate(questions)
        ]
    curves = {
        split: {
            name: [{"n": n, "flops": x.flops, "accuracy": float(x.right_Q.mean())} for n, x in points.items()]
            for name, points in found.items()
        }
        for split, found in ways.items()
    }
    return figures | {"curves": curves, BY_DOCUMENT: by_question}


def every_way(run: Run, questions: Sequence[Question], options: Options, room: int) -> Ways:
    """All ways at 1, 2, 4, … drafts or iterations, up to ``options.attempts``, each with what it needs to compute.

    A draft needs a fit of q to the prompt, shared by all drafts of a question, and a pass over prompt and draft; the
    best of N one more pass for each. A chain of rethinking has a fit to the prompt of its own; an iteration needs a fit
    to prompt and draft, and the next draft.
    """
    ladder = [2**i for i in range(options.attempts.bit_length())]
    sampled, likeliest = Sampling(max_new_tokens=room), Sampling(max_new_tokens=room, do_sample=False)
    prompt = np.mean([len(encode_prompt(run.tokenizer, x.prompt)) for x in questions])

    def cost(texts: Iterable[str], drafts: int, fits_to_drafts: int = 0, fits_to_prompt: int = 1) -> float:
        """FLOPs of a question with so many drafts, as long as these texts are."""
        both = prompt + np.mean([len(encode_prompt(run.tokenizer, text)) for text in texts])
        fit, forward = inference_flops(run.model.decoder, run.guide, int(both), options.inference(run))
        return float(fits_to_prompt * prompt * fit + both * (drafts * forward + fits_to_drafts * fit))

    texts_QN = _drafts(run, questions, options, sampled, ladder[-1])
    nats_QN, written = _scores(run, questions, texts_QN, options), [text for texts in texts_QN for text in texts]
    first = _right(questions, [texts[0] for texts in texts_QN])
    votes = {n: _right(questions, [_most_common(texts[:n]) for texts in texts_QN]) for n in ladder}
    best = {
        n: _right(questions, [x[int(nats_N[:n].argmin())] for x, nats_N in zip(texts_QN, nats_QN, strict=True)])
        for n in ladder
    }
    greedy = [texts[0] for texts in _drafts(run, questions, options, likeliest, 1)]
    found: Ways = {
        ONE: {1: Way(first, cost(written, 1))},
        "greedy": {1: Way(_right(questions, greedy), cost(greedy, 1))},
        VOTE: {n: Way(right_Q, cost(written, n)) for n, right_Q in votes.items()},
        "best of N": {n: Way(right_Q, cost(written, 2 * n)) for n, right_Q in best.items()},
    }
    if run.observe == "prompt" or not run.model.decoder.thought_shape.thoughts:
        return found  # no draft changes the thoughts
    for name, sampling, chains in (
        ("rethinking", sampled, 1),
        ("rethinking greedily", likeliest, 1),
        ("rethinking with votes", sampled, VOTERS),
    ):
        drafts_QNC = _loops(run, questions, options, sampling, ladder[-1], chains)
        written = [text for drafts in drafts_QNC for texts in drafts for text in texts]
        found[name] = {
            n: Way(
                _right(questions, [_most_common(drafts[n]) for drafts in drafts_QNC]),
                cost(written, chains * (n + 1), chains * n, chains),
            )
            for n in ladder
        }
    return found


def _drafts(run: Run, questions: Sequence[Question], options: Options, sampling: Sampling, n: int) -> list[list[str]]:
    """N independent drafts of every question, from q(z | prompt)."""
    asked = Sampling(max_new_tokens=sampling.max_new_tokens, do_sample=sampling.do_sample, num_return_sequences=n)
    thoughts = ThoughtSampling(inference=options.inference(run))
    texts = generate(run, [x.prompt for x in questions], asked, thoughts, seed=options.seed, batch_size=64)
    return [texts[first : first + n] for first in range(0, len(texts), n)]


def _loops(
    run: Run, questions: Sequence[Question], options: Options, sampling: Sampling, n: int, chains: int
) -> list[list[list[str]]]:
    """The drafts of every question by iteration, the first being the one before any rethinking, and chain."""
    asked = Rethinking(iterations=n, chains=chains, inference=options.inference(run))
    found = rethink(run, [x.prompt for x in questions], asked, sampling, seed=options.seed, batch_size=64)
    if len(found) < len(questions) or any(len(x.drafts) <= n for x in found):
        raise KeyboardInterrupt  # which `rethink` answers with the drafts so far
    return [x.drafts for x in found]


def _scores(run: Run, questions: Sequence[Question], texts_QN: Sequence[Sequence[str]], options: Options) -> np.ndarray:
    """−log p(draft | prompt) in nats, by one draw of z for each."""
    pairs = [
        (encode_prompt(run.tokenizer, question.prompt), [*encode_prompt(run.tokenizer, text), run.start_token])
        for question, texts in zip(questions, texts_QN, strict=True)
        for text in texts
    ]
    room = [tokens[: run.length - len(prompt)] for prompt, tokens in pairs]
    asked: dict[str, Any] = {"samples": 1, "seed": options.seed, "batch_size": 64, "workers": options.workers}
    scoring = Scoring(inference=options.inference(run), **asked)
    found = score_tokens(run, [(prompt, kept) for (prompt, _), kept in zip(pairs, room, strict=True)], scoring)
    return np.array([x.nats for x in found]).reshape(len(questions), -1)


def _right(questions: Sequence[Question], texts: Sequence[str]) -> Bool[np.ndarray, " Q"]:
    return np.array([answer_of(text) == question.answer for question, text in zip(questions, texts, strict=True)])


def _most_common(texts: Sequence[str]) -> str:
    """A text with the answer that most texts have; the first of several such answers, and none if no text has any."""
    answers = Counter(answer for text in texts if (answer := answer_of(text)) is not None)
    return f"#{answers.most_common(1)[0][0]}" if answers else ""
