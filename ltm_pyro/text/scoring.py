"""Scores of single texts, and of continuations given their contexts: z is inferred from the context alone.

Shapes: B rows, T tokens, U tokens of a continuation, V vocabulary, S draws of z, L layers, K thoughts, D width.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ltm_pyro.errors import UsageError
from ltm_pyro.inference.estimators import check_estimators, estimate, fit_problem, unavailable
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import Tokens, draw, encode, read
from ltm_pyro.utils.rng import seeded

LOGITS_AT_ONCE = 2**25  # numbers: 128 MB in float32


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How texts are charged.

    Args:
        estimator: of `ESTIMATORS`.
        samples: S, draws per text made after q is final.
        inference: the run's own, of evaluation, when not given.
        block: tokens between two fits of ``causal``.
        seed: of all noise.
        batch_size: texts fitted together.
    """

    estimator: str = "iwae"
    samples: int = 16
    inference: LocalInference | None = None
    block: int = 16
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_estimators([self.estimator], self.samples)
        if self.block < 1 or self.batch_size < 1:
            raise UsageError(f"Scoring needs block and batch_size ≥ 1, got {self.block} and {self.batch_size}.")


class TextScore(NamedTuple):
    """What a text costs under a estimator, in nats; divide by tokens or by bytes."""

    nats: float
    tokens: int
    bytes: int


class ContinuationScore(NamedTuple):
    """What every token of a continuation costs given all before it, in nats, and whether each was the likeliest."""

    nats_U: list[float]
    likeliest_U: list[bool]

    @property
    def nats(self) -> float:
        """−log p(continuation | context) as the estimator sees it."""
        return math.fsum(self.nats_U)

    @property
    def is_greedy(self) -> bool:
        """Whether taking the likeliest token every time would have written the continuation."""
        return all(self.likeliest_U)


def score(run: Run, texts: Sequence[str], scoring: Scoring | None = None) -> list[TextScore]:
    """Every text's charge; its document's end is not charged.

    A text longer than the model is cut into pieces of T tokens with thoughts of their own, as packed data are.
    """
    scoring = scoring or Scoring()
    unavailable(run.model, run.guide, [scoring.estimator])
    rows = [encode(run, text) for text in texts]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise UsageError(f"Text {empty[0]} is empty: there is nothing to score; leave it out.")
    pieces = [(text, row[i : i + run.length]) for text, row in enumerate(rows) for i in range(0, len(row), run.length)]
    nats = [0.0] * len(texts)
    for index, first in enumerate(range(0, len(pieces), scoring.batch_size)):
        chunk = pieces[first : first + scoring.batch_size]
        seed = (scoring.seed, index)
        batch, inference = read(run, [row for _, row in chunk]), scoring.inference or run.inference
        problem = fit_problem(run.model, run.guide, batch, inference, scoring.samples, seed, scoring.block)
        for (text, _), cost in zip(chunk, estimate(problem, scoring.estimator, seed).nats_B.tolist(), strict=True):
            nats[text] += cost
    return [TextScore(n, len(row), len(text.encode())) for n, row, text in zip(nats, rows, texts, strict=True)]


def score_continuations(
    run: Run, pairs: Sequence[tuple[str, str]], scoring: Scoring | None = None
) -> list[ContinuationScore]:
    r"""What continuations cost given their contexts, token by token; q has seen the context and nothing else.

    .. math:: -\log \frac{\sum_s w_s \, p(y_{\le u} \mid x, z_s)}{\sum_s w_s \, p(y_{<u} \mid x, z_s)},
        \qquad z_s \sim q(z \mid x)

    ``iwae`` has :math:`w_s = p(x, z_s) / q(z_s \mid x)`, ``causal`` and ``reused_noise`` equal weights; ``causal`` fits
    q again to what came before each block. ``bound`` and ``prior`` average −log p(y_u | x, z_s) instead, over draws
    from q and from p(z). None of these bounds −log p(y | x): they are predictive scores.

    Args:
        pairs: context and continuation, tokenised apart; an empty context leaves z to the prior.
    """
    return score_tokens(run, [(encode(run, context), encode(run, text)) for context, text in pairs], scoring)


def score_tokens(
    run: Run, pairs: Sequence[tuple[Tokens, Tokens]], scoring: Scoring | None = None
) -> list[ContinuationScore]:
    """`score_continuations` for contexts and continuations that are tokens already."""
    for index, (context, tokens) in enumerate(pairs):
        if not tokens:
            raise UsageError(f"Continuation {index} is empty: there is nothing to score; leave it out.")
        if len(context) + len(tokens) > run.length:
            raise UsageError(
                f"Context and continuation {index} have {len(context) + len(tokens)} tokens, but the model's length is "
                f"{run.length}: shorten the context."
            )
    scoring, scores = scoring or Scoring(), []
    longest = max((len(tokens) for _, tokens in pairs), default=1)
    size = max(1, min(scoring.batch_size, LOGITS_AT_ONCE // (longest * run.model.decoder.vocabulary)))
    for index, first in enumerate(range(0, len(pairs), size)):
        with fix_global_draws(run.model, scoring.seed):  # z and its weight are of one draw of what all sequences share
            scores += _Continuations(run, pairs[first : first + size], scoring, index).estimate()
    return scores


class _Continuations:
    """A few contexts and what follows them."""

    def __init__(self, run: Run, pairs: Sequence[tuple[Tokens, Tokens]], scoring: Scoring, index: int) -> None:
        self.run, self.pairs, self.scoring, self.seed = run, pairs, scoring, (scoring.seed, index)
        self.inference = scoring.inference or run.inference
        if scoring.estimator == "reused_noise":
            self.inference = replace(self.inference, noise="reused", particles=1, kl="exact", stop=None)

    def estimate(self) -> list[ContinuationScore]:
        """Block by block under ``causal``, else all at once; q goes on from block to block."""
        longest = max(len(tokens) for _, tokens in self.pairs)
        block = self.scoring.block if self.scoring.estimator == "causal" else longest
        scores = [ContinuationScore([], []) for _ in self.pairs]
        rows, state = torch.arange(len(self.pairs)), None
        for first in range(0, longest, block):
            left = torch.tensor([len(self.pairs[row][1]) > first for row in rows]).nonzero()[:, 0]
            rows, state = rows[left], state and state.select(left)
            known = [[*self.pairs[row][0], *self.pairs[row][1][:first]] for row in rows]
            asked = [self.pairs[row][1][first : first + block] for row in rows]
            state, nats, likeliest = self._predict(known, asked, state, first)
            for row, tokens, n, likely in zip(rows.tolist(), asked, nats, likeliest, strict=True):
                scores[row].nats_U.extend(n[: len(tokens)])
                scores[row].likeliest_U.extend(likely[: len(tokens)])
        return scores

    def _predict(
        self, known: Sequence[Tokens], asked: Sequence[Tokens], state: LocalState | None, first: int
    ) -> tuple[LocalState, list[list[float]], list[list[bool]]]:
        """Nats and verdicts of the next tokens, given those known."""
        estimator, run = self.scoring.estimator, self.run
        context = read(run, [[] for _ in known] if estimator == "prior" else known)
        with seeded(*self.seed, first), torch.no_grad():
            state, _ = infer_local(run.model, run.guide, context, self.inference, state)
        forecast = _Forecast(run, known, asked)
        with seeded(*self.seed, first, *estimator.encode()), torch.no_grad():
            for count in self._draws(forecast):
                with nullcontext() if state.noise is None else seeded(state.noise):
                    drawn = draw(run, context, state, count)
                forecast.add(drawn.z_BLKD, drawn.log_weight_B * (estimator == "iwae"))
        nats_BU = forecast.mean_nats_BU() if estimator in ("bound", "prior") else forecast.nats_BU()
        return state, nats_BU.tolist(), forecast.likeliest_BU().tolist()

    def _draws(self, forecast: "_Forecast") -> list[int]:
        """S cut into chunks that fit in memory; the draw that the fit has seen is one."""
        samples = 1 if self.scoring.estimator == "reused_noise" else self.scoring.samples
        chunk = max(1, LOGITS_AT_ONCE // forecast.numerator_BUV.numel())
        return [min(chunk, samples - done) for done in range(0, samples, chunk)]


class _Forecast:
    """The next U tokens of every row under a growing number of draws of z."""

    def __init__(self, run: Run, known: Sequence[Tokens], asked: Sequence[Tokens]) -> None:
        self.decoder = run.model.decoder
        whole = read(run, [[*before, *tokens] for before, tokens in zip(known, asked, strict=True)])
        with torch.no_grad():
            self.stem_BTD = self.decoder.stem(whole.inputs_BT)
        first_B1 = torch.tensor([[len(before)] for before in known], device=whole.inputs_BT.device)
        ahead_U = torch.arange(max(map(len, asked)), device=first_B1.device)
        self.place_BU = (first_B1 + ahead_U).clamp(max=whole.inputs_BT.shape[1] - 1)
        self.targets_BU = whole.targets_BT.gather(1, self.place_BU)
        size = (*self.place_BU.shape, self.decoder.vocabulary)
        self.numerator_BUV = self.stem_BTD.new_full(size, -torch.inf)
        self.denominator_BU = self.stem_BTD.new_full(size[:2], -torch.inf)
        self.sum_BU, self.draws = self.stem_BTD.new_zeros(size[:2]), 0

    def add(self, z_SBLKD: Float[Tensor, "S B L K D"], log_weight_SB: Float[Tensor, "S B"]) -> None:
        """More draws and their weights."""
        place_SBUD = self.place_BU[None, :, :, None].expand(len(z_SBLKD), -1, -1, self.stem_BTD.shape[-1])
        hidden_SBUD = self.decoder(self.stem_BTD, z_SBLKD).gather(2, place_SBUD)
        log_p_SBUV = F.linear(hidden_SBUD, self.decoder.embedding.weight).log_softmax(-1)
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
        """Whether a token is the likeliest under that weighted average."""
        return self.numerator_BUV.argmax(-1) == self.targets_BU
