"""Scores of whole texts, and of continuations given their contexts: there z is inferred from the context alone.

Shapes: B rows, T tokens, U tokens of a continuation, V vocabulary, S draws of z, L layers, K thoughts, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ltm_pyro.data.encode import (
    Tokens,
    batch_of_rows,
    batches_of_like_length,
    encode_document,
    encode_prompt,
    split_tokens,
)
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.estimators import OF_A_BATCH, check_estimators, estimate, fit_problem, unavailable
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import draw_thoughts
from ltm_pyro.utils.parallel import check_workers, parallel_map
from ltm_pyro.utils.rng import seeded

LOGITS_AT_ONCE = 2**25  # numbers: 128 MB in float32


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How texts are scored.

    Args:
        estimator: of `ESTIMATORS`.
        samples: S, draws per text made after q is final.
        inference: settings of local inference; those of the run's evaluation when not given.
        block: tokens between two fits of ``causal``.
        seed: the random seed.
        batch_size: texts of full length fitted together; of shorter ones up to four times as many.
        longer: what happens to a text longer than the model: ``split`` into rows with thoughts of their own, or scored
            as a ``whole`` under one z, alone in its batch (`ltm_pyro.models.PiecewiseDecoder` says what fits in
            memory).
        context: of a ``whole`` text, tokens that are read again before each piece of it; by default all that the
            decoder sees, layers x (window - 1), which makes the score that of one long row. It has to be below the
            model's length.
        workers: processes on a CPU that share the batches, forked from this one; no score depends on it.
    """

    estimator: str = "iwae"
    samples: int = 16
    inference: LocalInference | None = None
    block: int = 16
    seed: int = 0
    batch_size: int = 32
    longer: Literal["split", "whole"] = "split"
    context: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        check_estimators([self.estimator], self.samples)
        if self.estimator in OF_A_BATCH:
            raise UsageError(f"The estimator {self.estimator} is of several texts: ask `ltm evaluate` for it.")
        if self.block < 1 or self.batch_size < 1:
            raise UsageError(f"Scoring needs block and batch_size ≥ 1, got {self.block} and {self.batch_size}.")
        if self.longer not in ("split", "whole"):
            raise UsageError(f"A longer text cannot be scored as {self.longer!r}: choose split or whole.")
        if self.context is not None and (self.longer != "whole" or self.context < 0):
            raise UsageError(
                f"A context of {self.context} tokens has no meaning for longer texts that are {self.longer}: give 0 or "
                f'more, and `longer="whole"`.'
            )


class TextScore(NamedTuple):
    """−log p(x) of a text by an estimator, in nats, and what to divide it by.

    ``tokens`` counts `END_OF_TEXT`; ``bytes`` are those of the text in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int


class ContinuationScore(NamedTuple):
    """−log p of every token of a continuation given all tokens before it, in nats, and whether it is the likeliest."""

    nats_U: list[float]
    likeliest_U: list[bool]

    @property
    def nats(self) -> float:
        """−log p(continuation | context) by the estimator."""
        return math.fsum(self.nats_U)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives the continuation."""
        return all(self.likeliest_U)


@seeded(0)
def score(run: Run, texts: Sequence[str], scoring: Scoring | None = None) -> list[TextScore]:
    """The score of every text as a document: `END_OF_TEXT` is appended and scored, as in packed data.

    A text longer than the model is split into rows of T tokens, each with thoughts of its own, or scored whole under
    one z (``scoring.longer``).
    """
    if wrong := [texts] if isinstance(texts, str) else [x for x in texts if not isinstance(x, str)]:
        raise UsageError(f"A list of texts is scored, got {wrong[0]!r}.")
    scoring = scoring or Scoring()
    unavailable(run.model, run.guide, [scoring.estimator])
    if empty := [index for index, text in enumerate(texts) if not text]:
        raise UsageError(f"Text {empty[0]} is empty: there is nothing to score; leave it out.")
    documents = [encode_document(run.tokenizer, text) for text in texts]
    whole = {index for index, tokens in enumerate(documents) if len(tokens) > run.length and scoring.longer == "whole"}
    rows = [
        (index, row)
        for index, tokens in enumerate(documents)
        for row in split_tokens(tokens, run.length)
        if index not in whole
    ]
    nats, inference = [0.0] * len(texts), scoring.inference or run.inference
    if whole and not hasattr(run.model, "with_long_documents"):
        raise UsageError(
            f"Text {min(whole)} is longer than the model's {run.length} tokens, and {type(run.model).__name__} has no "
            f"`with_long_documents`: score it split."
        )
    long: Any = cast(Any, run.model).with_long_documents(scoring.context) if whole else None
    for index in sorted(whole):
        tokens = documents[index]
        batch = batch_of_rows([tokens], run.start_token, len(tokens), run.device)
        problem = fit_problem(long, run.guide, batch, inference, scoring.samples, scoring.seed, scoring.block)
        nats[index] = estimate(problem, scoring.estimator).nats_B.item()
    for (index, _), row_nats in zip(rows, score_rows(run, [row for _, row in rows], scoring), strict=True):
        nats[index] += row_nats
    return [TextScore(n, len(x), len(text.encode())) for n, x, text in zip(nats, documents, texts, strict=True)]


@seeded(0)
def score_rows(run: Run, rows: Sequence[Tokens], scoring: Scoring | None = None) -> list[float]:
    """−log p(x) by the estimator, in nats, of rows of at most T tokens, each with thoughts of its own."""
    scoring, nats = scoring or Scoring(), [0.0] * len(rows)
    unavailable(run.model, run.guide, [scoring.estimator])

    def batch_nats(chosen: Sequence[int]) -> list[float]:
        batch = batch_of_rows([rows[index] for index in chosen], run.start_token, run.length, run.device)
        inference = scoring.inference or run.inference
        problem = fit_problem(run.model, run.guide, batch, inference, scoring.samples, scoring.seed, scoring.block)
        return estimate(problem, scoring.estimator).nats_B.tolist()

    chunks = batches_of_like_length([*map(len, rows)], scoring.batch_size, run.length)
    check_workers(scoring.workers, run.device)
    for chosen, found in zip(chunks, parallel_map(batch_nats, chunks, scoring.workers), strict=True):
        for index, row_nats in zip(chosen, found, strict=True):
            nats[index] = row_nats
    return nats


def score_continuations(
    run: Run, pairs: Sequence[tuple[str, str]], scoring: Scoring | None = None
) -> list[ContinuationScore]:
    r"""−log p of continuations given their contexts, token by token; q is fitted to the context and nothing else.

    .. math:: -\log \frac{\sum_s w_s \, p(y_{\le u} \mid x, z_s)}{\sum_s w_s \, p(y_{<u} \mid x, z_s)},
        \qquad z_s \sim q(z \mid x)

    ``iwae`` has :math:`w_s = p(x, z_s) / q(z_s \mid x)`, ``prior_iwae`` draws from p(z) and has :math:`w_s =
    p(x \mid z_s)`, ``causal``, ``causal_prior`` and ``reused_noise`` equal weights; ``causal`` fits q again to what
    came before each block, and ``causal_prior`` draws from p(z) for each. ``bound`` and ``prior`` average
    −log p(y_u | x, z_s) instead, over draws from q and from p(z). None of these bounds −log p(y | x): they are
    predictive scores.

    Args:
        pairs: context and continuation, each encoded by itself and without `END_OF_TEXT`; z comes from the prior if the
            context is empty. Continuations of one context are scored at the same draws of one fit: the choices of a
            question cost one fit, and the noise of z has no part in which of them is the likeliest.
    """
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or [type(x) for x in pair] != [str, str]:
            raise UsageError(f"Pair {index} is {pair!r}, and not a context with its continuation, two texts.")
    encoded = [(encode_prompt(run.tokenizer, context), encode_prompt(run.tokenizer, text)) for context, text in pairs]
    return score_tokens(run, encoded, scoring)


@seeded(0)
def score_tokens(
    run: Run, pairs: Sequence[tuple[Tokens, Tokens]], scoring: Scoring | None = None
) -> list[ContinuationScore]:
    """`score_continuations` for contexts and continuations that are tokens already."""
    if reason := getattr(run.model, "only_bound", None):
        raise UsageError(f"Continuations have no score token by token: {reason}; score whole texts by bound.")
    for index, (context, tokens) in enumerate(pairs):
        if not tokens:
            raise UsageError(f"Continuation {index} is empty: there is nothing to score; leave it out.")
        if len(context) + len(tokens) > run.length:
            raise UsageError(
                f"Context and continuation {index} have {len(context) + len(tokens)} tokens, but the model's length is "
                f"{run.length}: shorten the context."
            )
    scoring, scores = scoring or Scoring(), [ContinuationScore([], [])] * len(pairs)
    if scoring.estimator == "ais":
        raise UsageError("The estimator ais scores whole texts, not continuations: choose iwae.")
    same: dict[tuple[int, ...], list[int]] = {}  # the pairs of one context, whose fit they share
    for index, (context, _) in enumerate(pairs):
        alone = (-1, index) if scoring.estimator == "causal" else ()  # because later fits are of other texts
        same.setdefault((*alone, *context), []).append(index)
    groups = [*same.values()]
    chunks = batches_of_like_length([len(pairs[x[0]][0]) for x in groups], scoring.batch_size, run.length)
    rows = [[index for group in chosen for index in groups[group]] for chosen in chunks]
    check_workers(scoring.workers, run.device)
    with fix_global_draws(run.model, scoring.seed):  # z and its weight belong to one draw of the global latents
        batches = ([pairs[index] for index in chosen] for chosen in rows)
        scored = parallel_map(partial(_score_batch, run, scoring), batches, scoring.workers)
        for chosen, found in zip(rows, scored, strict=True):
            for index, score_of_pair in zip(chosen, found, strict=True):
                scores[index] = score_of_pair
    return scores


@torch.no_grad()
def _score_batch(run: Run, scoring: Scoring, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[ContinuationScore]:
    """Block by block under ``causal``, where q continues, and ``causal_prior``; else all tokens at once.

    Continuations of the same tokens share one fit of q and its draws. The random streams depend on the tokens before a
    block and on nothing after them.
    """
    name, inference = scoring.estimator, scoring.inference or run.inference
    samples = scoring.samples
    if name == "reused_noise":  # its only draw is the one that q was fitted with
        inference, samples = replace(inference, noise="reused", particles=1, kl="exact", stop=None), 1
    is_prior = name in ("prior", "prior_iwae", "causal_prior")
    if is_prior:
        inference = replace(inference, steps=0)
    longest = max(len(tokens) for _, tokens in pairs)
    block = scoring.block if name in ("causal", "causal_prior") else longest
    scores, state = [ContinuationScore([], []) for _ in pairs], None
    rows: Sequence[int] = range(len(pairs))
    fit_of: dict[tuple[int, ...], int] = {}
    for first in range(0, longest, block):
        rows = [row for row in rows if len(pairs[row][1]) > first]
        known = [(*pairs[row][0], *pairs[row][1][:first]) for row in rows]
        before, fit_of = fit_of, {tokens: index for index, tokens in enumerate(dict.fromkeys(known))}
        if state is not None:  # every fit continues that of the text without its last block
            state = state.select(torch.tensor([before[tokens[:-block]] for tokens in fit_of], device=run.device))
        batch = batch_of_rows([*fit_of], run.start_token, run.length, run.device)
        keys, context = RowKeys.of_batch(batch, scoring.seed), batch
        if is_prior:
            context = batch_of_rows([[] for _ in fit_of], run.start_token, run.length, run.device)
        state, _ = infer_local(run.model, run.guide, context, inference, state, keys=keys)
        targets = [pairs[row][1][first : first + block] for row in rows]
        room = max(1, LOGITS_AT_ONCE // (max(map(len, targets)) * run.model.decoder.vocabulary))
        for start in range(0, len(rows), room):
            part = slice(start, start + room)
            fit_B = torch.tensor([fit_of[tokens] for tokens in known[part]], device=run.device)
            used_F, which_B = fit_B.unique(return_inverse=True)
            fitted, q, fit_keys = context.select(used_F), state.select(used_F), keys.select(used_F)
            average = _PredictiveAverage(run, known[part], targets[part])
            chunk = max(1, LOGITS_AT_ONCE // average.numerator_BUV.numel())  # draws that fit in memory
            for done in range(0, samples, chunk):
                noise = inference.draws_of_step(q).noise if name == "reused_noise" else None
                drawn = draw_thoughts(run, fitted, q, min(chunk, samples - done), fit_keys, done, noise)
                z_SFLKD, log_weight_SF = drawn
                if name == "prior_iwae":  # what p(z | context) weighs draws of p(z) with
                    seen = batch.select(used_F)
                    log_weight_SF = run.model.observation(z_SFLKD, seen).log_prob(run.model.observed(seen))
                average.add(z_SFLKD[:, which_B], log_weight_SF[:, which_B] * (name in ("iwae", "prior_iwae")))
            nats_BU = average.mean_nats_BU() if name in ("bound", "prior") else average.nats_BU()
            found = zip(rows[part], targets[part], nats_BU.tolist(), average.likeliest_BU().tolist(), strict=True)
            for row, tokens, nats_U, likeliest_U in found:
                scores[row].nats_U.extend(nats_U[: len(tokens)])
                scores[row].likeliest_U.extend(likeliest_U[: len(tokens)])
    return scores


class _PredictiveAverage:
    """p(y_u | y_{<u}, x, z_s) of the next U tokens of every row, averaged over draws of z that come chunk by chunk."""

    def __init__(self, run: Run, known: Sequence[Tokens], targets: Sequence[Tokens]) -> None:
        self.decoder = run.model.decoder
        rows = [[*before, *tokens] for before, tokens in zip(known, targets, strict=True)]
        whole = batch_of_rows(rows, run.start_token, run.length, run.device)
        self.stem_BTD = self.decoder.stem(whole.inputs_BT)
        first_B1 = torch.tensor([[len(before)] for before in known], device=whole.inputs_BT.device)
        ahead_U = torch.arange(max(map(len, targets)), device=first_B1.device)
        self.position_BU = (first_B1 + ahead_U).clamp(max=whole.inputs_BT.shape[1] - 1)
        self.targets_BU = whole.targets_BT.gather(1, self.position_BU)
        size = (*self.position_BU.shape, self.decoder.vocabulary)
        self.numerator_BUV = self.stem_BTD.new_full(size, -torch.inf)
        self.denominator_BU = self.stem_BTD.new_full(size[:2], -torch.inf)
        self.sum_BU, self.draws = self.stem_BTD.new_zeros(size[:2]), 0

    def add(self, z_SBLKD: Float[Tensor, "S B L K D"], log_weight_SB: Float[Tensor, "S B"]) -> None:
        """Takes more draws and their log weights."""
        position_SBUD = self.position_BU[None, :, :, None].expand(len(z_SBLKD), -1, -1, self.stem_BTD.shape[-1])
        hidden_SBUD = self.decoder(self.stem_BTD, z_SBLKD).gather(2, position_SBUD)
        log_p_SBUV = self.decoder.logits(hidden_SBUD).log_softmax(-1)
        log_p_SBU = log_p_SBUV.gather(-1, self.targets_BU.expand(len(z_SBLKD), -1, -1)[..., None])[..., 0]
        before_SBU = log_weight_SB[..., None] + log_p_SBU.cumsum(-1) - log_p_SBU
        self.numerator_BUV = self.numerator_BUV.logaddexp((before_SBU[..., None] + log_p_SBUV).logsumexp(0))
        self.denominator_BU = self.denominator_BU.logaddexp(before_SBU.logsumexp(0))
        self.sum_BU, self.draws = self.sum_BU + log_p_SBU.sum(0), self.draws + len(z_SBLKD)

    def nats_BU(self) -> Float[Tensor, "B U"]:
        """−log of the weighted average of p(y_u | y_{<u}, z_s)."""
        return self.denominator_BU - self.numerator_BUV.gather(-1, self.targets_BU[..., None])[..., 0]

    def mean_nats_BU(self) -> Float[Tensor, "B U"]:
        """The average of −log p(y_u | y_{<u}, z_s)."""
        return -self.sum_BU / self.draws

    def likeliest_BU(self) -> Bool[Tensor, "B U"]:
        """Whether a token is the likeliest one under the weighted average."""
        return self.numerator_BUV.argmax(-1) == self.targets_BU
