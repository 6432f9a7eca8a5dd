"""Estimates of −log p(x) of each sequence, and the figures of a whole text with their errors.

Shapes: B sequences, S samples, J averages over the samples in one estimate.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Part, whole_pieces
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED, pareto_k
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.statistics import Estimate, clustered_ratio, standard_error

NEARLY_ALL = 0.95  # the share of sequences whose k-hat has to be good
SETTLED = 1e-3  # nats per token that more samples may still take away from a sum of averages
SLOWEST = 0.9  # of a step of the curve to the step before it: noise would make it larger where both are nearly 0
GAIN = ("causal", "causal_prior")  # the estimators whose difference is the predictive gain


class NatsAndKL(NamedTuple):
    """An estimate of −log p(x) for each sequence, and its KL term, in nats.

    ``kl_stderr_B`` is the Monte Carlo error of the KL, ``nats_stderr_B`` that of the nats, and ``log_weights_SJB`` are
    the weights whose averages the estimate is made of (`of_weights`); None where an estimator has none. An estimate of
    the whole text has one average, one block by block has an average for each block.
    """

    nats_B: Float[Tensor, " B"]
    kl_B: Float[Tensor, " B"]
    kl_stderr_B: Float[Tensor, " B"] | None = None
    log_weights_SJB: Float[Tensor, "S J B"] | None = None
    nats_stderr_B: Float[Tensor, " B"] | None = None

    @classmethod
    def of_weights(
        cls, log_weights_SJB: Float[Tensor, "S J B"], kl_B: Float[Tensor, " B"] | None = None
    ) -> "NatsAndKL":
        """−Σ_j log (1/S) Σ_s w_sj."""
        nats_B = (math.log(len(log_weights_SJB)) - log_weights_SJB.logsumexp(0)).sum(0)
        return cls(nats_B, torch.zeros_like(nats_B) if kl_B is None else kl_B, log_weights_SJB=log_weights_SJB)

    @classmethod
    def concatenate(cls, batches: Sequence["NatsAndKL"]) -> "NatsAndKL":
        """The estimates of several batches, in float64; a shorter batch has further averages of weights that are 1."""
        columns = []
        for parts in zip(*batches, strict=True):
            averages = max((part.shape[1] for part in parts if part is not None and part.dim() == 3), default=0)
            columns.append(None if parts[0] is None else torch.cat([_pad(x, averages) for x in parts], -1))
        return cls._make(columns)

    def curve(self, samples: int) -> Float[Tensor, " B"]:
        """The estimate with fewer samples, averaged over disjoint parts of the weights."""
        assert self.log_weights_SJB is not None
        parts = self.log_weights_SJB.split(samples)
        whole = torch.stack([part for part in parts if len(part) == samples])
        return (math.log(samples) - whole.logsumexp(1)).mean(0).sum(0)


def _pad(x: Tensor, averages: int) -> Tensor:
    short = averages - x.shape[1] if x.dim() == 3 else 0
    return torch.nn.functional.pad(x.double().cpu(), (0, 0, 0, short)) if short else x.double().cpu()


class RowScores(NamedTuple):
    """Every sequence's id, documents (None if not known), tokens, bytes, and nats and KL by estimator."""

    ids_B: Tensor
    parts: tuple[tuple[Part, ...], ...] | None
    tokens_B: Tensor
    bytes_B: Tensor
    scores: dict[str, NatsAndKL]

    def select(self, index_B: Tensor) -> "RowScores":
        """The sequences at the given indices, in their order."""
        parts = None if self.parts is None else tuple(self.parts[index] for index in index_B.tolist())
        scores = {
            name: NatsAndKL._make(None if x is None else x[..., index_B] for x in found)
            for name, found in self.scores.items()
        }
        return RowScores(self.ids_B[index_B], parts, self.tokens_B[index_B], self.bytes_B[index_B], scores)

    @property
    def pieces(self) -> list[Part] | None:
        """The document of each sequence, or the piece of one; None if a sequence is not of one document alone."""
        return whole_pieces(self.parts)

    @property
    def predictive_gain_B(self) -> Tensor | None:
        """`causal_prior` − `causal` of each sequence in nats; None if one of the two was not requested.

        NaN where one block holds all that is scored: nothing is before it, so that 0 would say nothing about thoughts.
        """
        with_q, without_q = map(self.scores.get, GAIN)
        if not with_q or not without_q:
            return None
        later_SJB = cast(Tensor, with_q.log_weights_SJB)[:, 1:]  # 0 for blocks behind a sequence's end
        return (without_q.nats_B - with_q.nats_B).masked_fill((later_SJB == 0).all(0).all(0), torch.nan)

    @property
    def is_finite_B(self) -> Tensor:
        """Whether a sequence has a finite figure under every estimator; others are in no score."""
        return torch.stack([found.nats_B.isfinite() for found in self.scores.values()]).all(0)

    @property
    def documents_B(self) -> Tensor:
        """A number for each sequence, the same for the pieces of one document; its own if the data do not tell them.

        A row of a stream counts to the document that it begins in.
        """
        if self.parts is None or not all(self.parts):
            return torch.arange(len(self.ids_B))  # not the ids, which `make_batch` counts anew in every batch
        return torch.tensor([row[0].number for row in self.parts])

    def bits_per_byte(self, nats_B: Tensor) -> Estimate:
        """Some nats of each sequence, or a difference of two, as bits per byte, over the sequences of `is_finite_B`.

        A sequence whose nats are NaN, as those of `predictive_gain_B` may be, does not count.
        The error is that of this ratio: documents differ in tokens per byte, so that the one per token cannot be
        rescaled.
        """
        keep_B = self.is_finite_B & ~nats_B.isnan()
        return clustered_ratio(nats_B[keep_B] / math.log(2), self.bytes_B[keep_B], self.documents_B[keep_B])


@dataclass(frozen=True)
class Rate:
    """Nats per token over a whole text.

    The standard error is over documents, whose pieces are not independent of each other (over sequences if the data do
    not tell documents); ``interval`` is the 95 % interval by Student's t (`clustered_ratio`). NaN for one document.
    """

    nats_per_token: float
    stderr_nats_per_token: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Point(Rate):
    """An estimate with a certain number of samples, and the passes through the decoder that it costs.

    A pass is one sequence forward with one z, or back from its ELBO to z. None for other estimators than `iwae` and
    `prior_iwae`; at most so many if fast steps may stop early.
    """

    passes: int | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One estimator's results over a whole text; perplexity is exp(nats per token).

    ``stderr`` is over documents, whose pieces are not independent; over sequences if the data do not tell them.

    ``monte_carlo_stderr`` is the part of it that comes from the draws: 0 with infinitely many. None for estimators
    that do not know it, and for too few draws.

    ``converged`` says whether an average over samples can be trusted, None for other estimators. For a weighted average
    k-hat is below min(1 − 1 / log10 S, 0.7) for nearly all sequences (Vehtari et al. 2024, arXiv 1507.02646), or `ais`
    agrees within its error. For `causal` and `causal_prior`, see `is_settled`. ``curve`` has the figure by number of
    samples.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    stderr_nats_per_token: float
    kl_nats_per_token: float
    samples: int
    is_bound: bool
    converged: bool | None = None
    monte_carlo_stderr: float | None = None
    curve: dict[int, Point] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    r"""The size of the text that was scored, and the score of every estimator.

    ``predictive_gain`` is ``causal_prior`` − ``causal``: what having thought about the past is worth for predicting
    what comes,

    .. math:: \sum_b \big[ -\log E_{p(z)}\, p(x_b \mid x_{<b}, z) \big]
        - \big[ -\log E_{q(z \mid x_{<b})}\, p(x_b \mid x_{<b}, z) \big]

    in nats per token; None if one of the two was not requested, or no sequence is longer than a block. Those that are
    not have no gain: they are left out of it, and ``shorter_than_a_block`` counts them. Unlike a difference of bounds
    it is 0 for a decoder that does not use z, and for thoughts of another text it is below 0.

    ``cut`` says whether the last document is not whole, because only the first sequences were scored. ``excluded`` are
    the ids of sequences with a non-finite estimate; no score includes them. ``unavailable`` maps an estimator's name to
    the reason why it is not defined for this model and guide. ``rows`` are the figures of every sequence.
    ``no_bound`` says why no figure is a bound, where one that is called so is none under this model.
    ``worse_than_prior`` says by how much `bound` is above `prior`, and what to do, where q ended worse than the prior.
    """

    tokens: int
    documents: int | None  # None if the data do not tell them
    sequences: int
    bytes: int
    excluded: tuple[int, ...]
    estimates: dict[str, Score]
    predictive_gain: Rate | None = None
    shorter_than_a_block: int | None = None  # None without a predictive gain
    unavailable: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    worse_than_prior: str | None = None
    no_bound: str | None = None
    rows: RowScores | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries for JSON, without ``rows``; non-finite numbers become None."""
        result = asdict(replace(self, rows=None))
        del result["rows"]
        return cast(dict[str, Any], finite(result))


def rate_of(nats_B: Tensor, tokens_B: Tensor, documents_B: Tensor | None = None) -> Rate:
    """Nats per token of all sequences; ``documents_B`` has the same number for the pieces of one document."""
    return Rate(*clustered_ratio(nats_B, tokens_B, documents_B)[:3])


def _monte_carlo(result: NatsAndKL, tokens_B: Tensor) -> float | None:
    """The standard error of nats per token over the draws, which are independent between sequences."""
    if result.nats_stderr_B is None or not result.nats_stderr_B.isfinite().all():
        return None
    return float(result.nats_stderr_B.square().sum().sqrt() / tokens_B.sum())


def is_converged(result: NatsAndKL, reference: NatsAndKL | None = None) -> bool:
    """Whether a weighted average can be trusted, as `Score.converged` says."""
    log_weights_SB = cast(Tensor, result.log_weights_SJB).flatten(1)
    if _has_light_tails(log_weights_SB):
        return True
    if reference is None or reference is result:
        return False
    reference_SB = cast(Tensor, reference.log_weights_SJB).flatten(1)
    if not _has_light_tails(reference_SB):
        return False
    error = standard_error(reference_SB.softmax(0) * len(reference_SB)).square().sum().sqrt()
    return bool((result.nats_B.sum() - reference.nats_B.sum()).abs() < 2 * error)


def _has_light_tails(log_weights_SB: Tensor) -> bool:
    """Whether k-hat of nearly all sequences says that their weights can be averaged; of fewer than 25 nothing does."""
    samples = len(log_weights_SB)
    if samples < 25:
        return False
    limit = min(1 - 1 / math.log10(samples), TRUSTED)
    return bool((pareto_k(log_weights_SB) < limit).double().mean() >= NEARLY_ALL)


def is_settled(result: NatsAndKL, tokens_B: Tensor) -> bool:
    r"""Whether more samples would take less than `SETTLED` nats per token away from a sum of averages.

    The last two steps of the curve, from S/16 to S/4 and to S samples, continue as a geometric series,

    .. math:: \sum_{n \geq 1} r^n d_2, \quad d_1 = c(S/16) - c(S/4), \quad d_2 = c(S/4) - c(S), \quad r = d_2 / d_1

    with r at least 1/4, its value if Jensen's gap falls as 1 / S: it falls more slowly where weights have heavy tails.
    Below 16 samples, where nothing tells how it falls, the answer is no.
    """
    samples = len(cast(Tensor, result.log_weights_SJB))
    if samples < 16:
        return False
    points = [result.curve(samples // n).sum() for n in (16, 4, 1)]
    first, second = (float((x - y) / tokens_B.sum()) for x, y in pairwise(points))
    ratio = min(max(second / first, 1 / 4), SLOWEST) if first > 0 else SLOWEST
    return second * ratio / (1 - ratio) < SETTLED


def summarise(rows: RowScores, points: Sequence[int], are_bounds: Mapping[str, bool], fit_passes: int) -> Evaluation:
    """The figures of a text from those of its sequences.

    Args:
        points: numbers of samples, for `Score.curve`; the largest one made the estimates.
        are_bounds: whether an estimator is an upper bound in expectation.
        fit_passes: passes through the decoder that fit q to a sequence.
    """
    is_finite_B = rows.is_finite_B
    excluded = tuple(sorted(int(x) for x in rows.ids_B[~is_finite_B]))
    if excluded:
        warnings.warn(f"No finite score for the sequences {list(excluded)}: they are left out.", stacklevel=3)
    if not is_finite_B.any():
        raise UsageError("No sequence has a finite score: the checkpoint or the text is broken; try another.")
    pieces = rows.pieces
    tokens_B, bytes_B, documents_B = (x[is_finite_B] for x in (rows.tokens_B, rows.bytes_B, rows.documents_B))
    results = rows.select(is_finite_B.nonzero()[:, 0]).scores
    rate = partial(rate_of, tokens_B=tokens_B, documents_B=documents_B)

    def score(name: str, result: NatsAndKL) -> Score:
        nats, total_bytes, by_block = rate(result.nats_B), bytes_B.sum().item(), name in GAIN
        converged, curve = None, {}
        if result.log_weights_SJB is not None:
            fit = {"iwae": fit_passes, "prior_iwae": 0}.get(name)
            converged = is_settled(result, tokens_B) if by_block else is_converged(result, results.get("ais"))
            for n in sorted(points):
                at = rate(result.curve(n))
                passes = None if fit is None else fit + n
                curve[n] = Point(at.nats_per_token, at.stderr_nats_per_token, at.interval, passes)
        return Score(
            nats_per_token=nats.nats_per_token,
            perplexity=math.exp(nats.nats_per_token) if nats.nats_per_token < 709 else math.inf,
            bits_per_byte=result.nats_B.sum().item() / math.log(2) / total_bytes if total_bytes else math.nan,
            stderr_nats_per_token=nats.stderr_nats_per_token,
            kl_nats_per_token=(result.kl_B.sum() / tokens_B.sum()).item(),
            samples=1 if name == "reused_noise" else max(points),
            is_bound=are_bounds[name],
            converged=converged,
            monte_carlo_stderr=_monte_carlo(result, tokens_B),
            curve=curve,
        )

    gain, short = None, None
    if rows.predictive_gain_B is not None:
        gain_B = rows.predictive_gain_B[is_finite_B]
        has_B = ~gain_B.isnan()
        short = int((~has_B).sum())
        gain = rate_of(gain_B[has_B], tokens_B[has_B], documents_B[has_B]) if has_B.any() else None
    return Evaluation(
        tokens=int(tokens_B.sum()),
        documents=None if pieces is None else len(documents_B.unique()),
        sequences=len(tokens_B),
        bytes=int(bytes_B.sum()),
        excluded=excluded,
        estimates={name: score(name, result) for name, result in results.items()},
        predictive_gain=gain,
        shorter_than_a_block=short,
    )
