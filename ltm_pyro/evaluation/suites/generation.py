"""Generated texts compared with held-out texts: diversity, repetition, perplexity under a judge, MAUVE."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice

import numpy as np

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import held_out
from ltm_pyro.evaluation.suites.features import load_extractor
from ltm_pyro.evaluation.suites.mauve import mauve
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import decode, generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score
from ltm_pyro.utils.statistics import standard_error

TEXTS = 256
LENGTH = 128  # tokens per text; the model's length if it is shorter
Words = Sequence[str]
_load_judge = cache(load_run)  # once for all parts


def parts(options: Options) -> list[Part]:
    """Texts from multinomial sampling and from nucleus sampling (top_p 0.95), and held-out texts for comparison."""
    multinomial, nucleus = Sampling(), Sampling(top_p=0.95)
    return [
        Part("multinomial", partial(score_generated, options, multinomial)),
        Part("nucleus 0.95", partial(score_generated, options, nucleus)),
        Part("held-out text", partial(score_held_out, options)),
    ]


def score_generated(options: Options, sampling: Sampling, run: Run) -> Figures:
    """The figures of texts whose thoughts are drawn from the prior; a text ends at the end-of-text token."""
    count = _count(options)
    texts = generate(run, [""] * count, replace(sampling, max_new_tokens=min(LENGTH, run.length)), seed=options.seed)
    return text_figures(texts, held_out_texts(run, count), options)


def score_held_out(options: Options, run: Run) -> Figures:
    """The figures of held-out texts of the same length; their MAUVE compares them with other held-out texts."""
    texts = held_out_texts(run, 2 * _count(options), least=4)
    return text_figures(texts[: len(texts) // 2], texts[len(texts) // 2 :], options)


def _count(options: Options) -> int:
    """How many texts are compared with as many others."""
    if options.limit == 1:
        raise UsageError("The suite generation compares texts with each other, but --limit is 1: give at least 2.")
    return options.limit or TEXTS


def held_out_texts(run: Run, count: int, least: int = 2) -> list[str]:
    """The beginnings of ``count`` held-out sequences, as long as the generated texts, but at ``least`` so many."""
    dataset, length = held_out(run), min(LENGTH, run.length)
    rows = (dataset[index] for index in range(len(dataset)))
    texts = decode(run, [row.tokens_T[:length].tolist() for row in islice(rows, count)])
    if len(texts) < least:
        raise UsageError(
            f"The run's held-out data has {len(texts)} sequences, fewer than {least}: pack it with a larger "
            f"--val-fraction."
        )
    return texts


def text_figures(texts: list[str], others: list[str], options: Options) -> Figures:
    """All figures of a set of texts; MAUVE compares them with ``others``."""
    texts, blank = [text for text in texts if text.strip()], sum(not text.strip() for text in texts)
    if len(texts) < 2:
        raise UsageError("Fewer than two texts have a character in them: the run writes nothing; train it for longer.")
    words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    figures: Figures = {f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)}
    figures["repetition_4"], figures["repetition_4_stderr"] = _mean([repetition(text) for text in words])
    figures["self_bleu_4"], figures["self_bleu_4_stderr"] = _mean(self_bleu(words))
    figures["compression_ratio"] = compression_ratio(texts)
    if options.judge:
        figures |= judge_scores(_load_judge(options.judge, trust=options.trust), texts, options.seed, options.workers)
    if options.features:
        features = load_extractor(options.features, options.trust)
        p_NF, q_MF = features(texts, options.seed), features(others, options.seed)
        figures["mauve"] = mauve(p_NF, q_MF, options.seed)
    return {**figures, "texts": len(texts), "blank": blank, "words": sum(map(len, words))}


def judge_scores(judge: Run, texts: list[str], seed: int, workers: int = 1) -> Figures:
    """Perplexity and bits per byte of texts under the judge's bound, as documents; the reason if it has no bound."""
    if reason := missing_bound(judge.model, judge.guide):
        why = f"the judge has no bound ({reason})"
        return {"unavailable": dict.fromkeys(("judged_perplexity", "judged_bits_per_byte"), why)}
    scores = score(judge, texts, Scoring(estimator="bound", samples=1, seed=seed, workers=workers))
    nats, tokens = math.fsum(s.nats for s in scores), sum(s.tokens for s in scores)
    bits = nats / math.log(2) / sum(s.bytes for s in scores)
    return {"judged_perplexity": math.exp(nats / tokens), "judged_bits_per_byte": bits}


def distinct(texts: Sequence[Words], n: int) -> float:
    """Different n-grams divided by all n-grams, over all texts together (Li et al. 2016, arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(text: Words, n: int = 4) -> float:
    """The share of a text's n-grams that repeat an earlier one (Welleck et al. 2020, arXiv 1908.04319)."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes divided by compressed bytes of all texts together (zlib, level 9); repetition across texts raises it."""
    data = "\n".join(texts).encode()
    return len(data) / len(zlib.compress(data, 9))


def self_bleu(texts: Sequence[Words], order: int = 4) -> list[float]:
    """The BLEU of every text with all other texts as references (Zhu et al. 2018, arXiv 1802.01886).

    Clipped n-gram precision with add-one smoothing for n > 1, and the brevity penalty for the reference of the closest
    length.
    """
    counts = [[Counter(_grams(text, n)) for n in range(1, order + 1)] for text in texts]
    best = [_two_highest([count[n] for count in counts]) for n in range(order)]
    return [_bleu(index, counts[index], best, [len(text) for text in texts]) for index in range(len(texts))]


def _bleu(
    index: int, own: list[Counter[Words]], best: list[dict[Words, list[tuple[int, int]]]], sizes: list[int]
) -> float:
    logs = []
    for n, (grams, highest) in enumerate(zip(own, best, strict=True)):
        matches = 0
        for gram, k in grams.items():
            elsewhere = max((count for count, text in highest[gram] if text != index), default=0)
            matches += min(k, elsewhere)
        logs.append(math.log((matches + (n > 0)) / (grams.total() + (n > 0))) if matches + n else -math.inf)
    others = sizes[:index] + sizes[index + 1 :]
    closest = min(others, key=lambda size: (abs(size - sizes[index]), size))
    brevity = min(0.0, 1 - closest / max(1, sizes[index]))
    return math.exp(brevity + sum(logs) / len(logs))


def _two_highest(counts: Sequence[Counter[Words]]) -> dict[Words, list[tuple[int, int]]]:
    """The two highest counts of every n-gram as (count, text), so that the highest among the other texts is known."""
    best: dict[Words, list[tuple[int, int]]] = {}
    for index, count in enumerate(counts):
        for gram, k in count.items():
            best[gram] = sorted([*best.get(gram, []), (k, index)], reverse=True)[:2]
    return best


def _grams(text: Words, n: int) -> list[Words]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(np.mean(values)), float(standard_error(np.array(values)))
