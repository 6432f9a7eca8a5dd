"""Zero-shot perplexity: texts that the run was not trained on (arXiv 2502.01567, section 4)."""

import math
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from ltm_pyro.data.documents import Fields, read_documents
from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Figures, Options, Part, no_data, score_text
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.run import Run
from ltm_pyro.text.scoring import Scoring, score_continuations
from ltm_pyro.utils.statistics import clustered_mean, clustered_ratio

DATA = {  # data set -> file name patterns, in order of preference
    "ptb": ("ptb*test*", "ptb*valid*", "ptb*"),
    "wikitext-2": ("wikitext*2*test*", "wikitext*2*valid*", "wikitext*2*"),
    "wikitext-103": ("wikitext*103*test*", "wikitext*103*valid*", "wikitext*103*"),
    "lm1b": ("lm1b*", "news.en*heldout*"),
    "lambada": ("lambada*test*", "lambada*"),
    "ag-news": ("ag*news*test*", "ag*news*"),
    "pubmed": ("*pubmed*test*", "*pubmed*"),
    "arxiv": ("*arxiv*test*", "*arxiv*"),
}
PAPER = {  # perplexity as the paper prints it, scored with the noise of the fit (see docs/evaluation.md)
    "ptb": {"GPT-2-Large": 161.3, "LTM-Medium": 32.06, "LTM-Large": 4.43},
    "wikitext-2": {"GPT-2-Large": 30.09, "LTM-Medium": 17.39, "LTM-Large": 3.66},
    "lm1b": {"GPT-2-Large": 45.61, "LTM-Medium": 25.16, "LTM-Large": 3.92},
}
ESTIMATORS = ("bound", "iwae", "prior", "reused_noise", *GAIN)


def parts(options: Options) -> list[Part]:
    """One part per data set that is present; LAMBADA has a second part for its last words."""
    places = {name: options.find(name, *patterns) for name, patterns in DATA.items()}
    found = [
        Part(name, partial(perplexity, place, options), PAPER.get(name, {})) for name, place in places.items() if place
    ]
    if not found:
        raise no_data("zero-shot", ", ".join(patterns[-1] for patterns in DATA.values()), options)
    if place := places["lambada"]:
        found.append(Part("lambada last word", partial(last_words, place, options)))
    return found


def perplexity(place: str, options: Options, run: Run) -> Figures:
    """Every estimator's figures for a text; perplexity is exp(nats / tokens), in the run's own tokens.

    Figures that need a bound are None if the run has none.
    """
    estimates, gain, others, _ = score_text(run, place, ESTIMATORS, options)
    bound, iwae = (estimates.get(name, {}) for name in ("bound", "iwae"))  # missing if q has no density
    return {
        "perplexity": bound.get("perplexity"),
        "nats_per_token": bound.get("nats_per_token"),
        "stderr": bound.get("stderr_nats_per_token"),
        "iwae": iwae.get("nats_per_token"),
        "bits_per_byte": bound.get("bits_per_byte"),
        "predictive_gain": gain.get("nats_per_token"),
        "predictive_gain_stderr": gain.get("stderr_nats_per_token"),
        **others,
        "estimates": estimates,
    }


def last_words(place: str, options: Options, run: Run) -> Figures:
    """Perplexity and accuracy of the last word of every passage, q fitted to the words before it only."""
    passages = [*islice(read_documents([place], Fields(labels=None)), options.limit)]
    pairs, scored = [], []
    for passage in passages:
        context, space, word = passage.text.strip().rpartition(" ")
        tokens = [encode_prompt(run.tokenizer, text) for text in (context, space + word)]
        if context and word and sum(map(len, tokens)) <= run.length:
            pairs.append((context, space + word))
            scored.append(passage)
    if not pairs:
        raise UsageError(f"{place} has no passage of two words or more that fits into {run.length} tokens.")
    asked: dict[str, Any] = {"samples": options.samples, "seed": options.seed, "workers": options.workers}
    scoring = Scoring(inference=options.inference(run), **asked)
    scores = score_continuations(run, pairs, scoring)
    n, tokens_N = len(scores), np.array([len(score.nats_U) for score in scores])
    nats = clustered_ratio(np.array([score.nats for score in scores]), tokens_N)
    accuracy = clustered_mean(np.array([score.is_greedy for score in scores]))
    return {
        "perplexity": math.exp(nats.value),
        "nats_per_token": nats.value,
        "accuracy": accuracy.value,
        "stderr": accuracy.stderr if n > 1 else None,
        "passages": n,
        "left_out": len(passages) - n,
        "tokens": int(tokens_N.sum()),
        BY_DOCUMENT: [
            {
                **{"id": passage.id, "file": passage.file, "labels": passage.labels},
                **{"tokens": len(score.nats_U), "nats": score.nats, "is_right": score.is_greedy},
            }
            for passage, score in zip(scored, scores, strict=True)
        ],
    }
