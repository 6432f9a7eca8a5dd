"""Zero-shot perplexity on texts that a run was not trained on (arXiv 2502.01567, section 4)."""

import math
from collections.abc import Callable
from functools import partial
from itertools import islice

import numpy as np

from ltm_pyro.data.documents import read_documents
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part, none_found
from ltm_pyro.runs.run import Run
from ltm_pyro.text.scoring import Scoring, score_continuations
from ltm_pyro.text.thoughts import encode
from ltm_pyro.utils.statistics import standard_error

DATA = {  # data set -> how its files are named, the likeliest split first
    "ptb": ("ptb*test*", "ptb*valid*", "ptb*"),
    "wikitext-2": ("wikitext*2*test*", "wikitext*2*valid*", "wikitext*2*"),
    "wikitext-103": ("wikitext*103*test*", "wikitext*103*valid*", "wikitext*103*"),
    "lm1b": ("lm1b*", "news.en*heldout*"),
    "lambada": ("lambada*test*", "lambada*"),
    "ag-news": ("ag*news*test*", "ag*news*"),
    "pubmed": ("*pubmed*test*", "*pubmed*"),
    "arxiv": ("*arxiv*test*", "*arxiv*"),
}
PAPER = {  # perplexity as the paper prints it, with the noise of the fit (docs/evaluation.md says what that means)
    "ptb": {"GPT-2-Large": 161.3, "LTM-Medium": 32.06, "LTM-Large": 4.43},
    "wikitext-2": {"GPT-2-Large": 30.09, "LTM-Medium": 17.39, "LTM-Large": 3.66},
    "lm1b": {"GPT-2-Large": 45.61, "LTM-Medium": 25.16, "LTM-Large": 3.92},
}
ESTIMATORS = ("bound", "iwae", "prior", "reused_noise")


def parts(options: Options) -> list[Part]:
    """Every data set that is there; LAMBADA twice, the second time for its last words."""
    places = {name: options.found(name, *patterns) for name, patterns in DATA.items()}
    found = [Part(name, perplexity(place, options), PAPER.get(name, {})) for name, place in places.items() if place]
    if not found:
        raise none_found("zero-shot", ", ".join(patterns[-1] for patterns in DATA.values()), options)
    if place := places["lambada"]:
        found.append(Part("lambada last word", partial(last_words, place, options)))
    return found


def perplexity(place: str, options: Options) -> Callable[[Run], Figures]:
    """Every estimator's figures for a text; perplexity is exp(nats / tokens), over the run's own tokens.

    What needs a bound is None for a run that has none.
    """

    def figures(run: Run) -> Figures:
        found = evaluate_run(
            run, place, ESTIMATORS, options.samples, options.fast_steps, options.limit, options.seed
        ).as_dict()
        estimators, gain = found.pop("estimates"), found.pop("thinking_gain") or {}
        bound, iwae = (estimators.get(name, {}) for name in ("bound", "iwae"))  # empty where q has no density
        return {
            "perplexity": bound.get("perplexity"),
            "nats_per_token": bound.get("nats_per_token"),
            "stderr": bound.get("stderr_nats_per_token"),
            "iwae": iwae.get("nats_per_token"),
            "bits_per_byte": bound.get("bits_per_byte"),
            "thinking_gain": gain.get("nats_per_token"),
            "thinking_gain_stderr": gain.get("stderr_nats_per_token"),
            **found,
            "estimates": estimators,
        }

    return figures


def last_words(place: str, options: Options, run: Run) -> Figures:
    """Perplexity and accuracy of every passage's last word, q fitted to what comes before it alone."""
    passages = [document.text.strip() for document in islice(read_documents([place]), options.limit)]
    pairs = [split for passage in passages if (split := _split(passage)) and fits(run, *split)]
    if not pairs:
        raise UsageError(f"{place} has no passage of two words or more that fits into {run.length} tokens.")
    scoring = Scoring(samples=options.samples, inference=options.inference(run), seed=options.seed)
    scores = score_continuations(run, pairs, scoring)
    right_N, n = np.array([score.is_greedy for score in scores]), len(scores)
    tokens = sum(len(score.nats_U) for score in scores)
    nats = math.fsum(score.nats for score in scores)
    return {
        "perplexity": math.exp(nats / tokens),
        "nats_per_token": nats / tokens,
        "accuracy": float(right_N.mean()),
        "stderr": float(standard_error(right_N)) if n > 1 else None,
        "passages": n,
        "left_out": len(passages) - n,
        "tokens": tokens,
    }


def fits(run: Run, context: str, continuation: str) -> bool:
    """Whether both together are within the model's length."""
    return len(encode(run, context)) + len(encode(run, continuation)) <= run.length


def _split(passage: str) -> tuple[str, str] | None:
    context, space, word = passage.rpartition(" ")
    return (context, space + word) if context and word else None
