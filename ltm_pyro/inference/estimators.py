"""Evaluation estimators: what a figure in nats per token means, and whether it is a bound on −log p(x).

Shapes: B sequences, S posterior samples.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Batch, Guide, Init, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import Draws, elbo_terms, log_weights, missing_bound, normalisers, prior_log_likelihood
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import ratio_standard_error

TOKENS_AT_ONCE = 8_192  # tokens x draws in one pass of the decoder: keeps the logits of a small vocabulary in cache


class NatsAndKL(NamedTuple):
    """What a estimator charges each sequence, and the KL in it, in nats."""

    nats_B: Float[Tensor, " B"]
    kl_B: Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One batch to score: the model, the fitted q, and how many draws to take."""

    model: Model
    guide: Guide
    batch: Batch
    inference: LocalInference
    samples: int
    state: LocalState
    block: int = 16

    def draws(self) -> list[int]:
        """S cut into chunks that fit in memory."""
        chunk = max(1, TOKENS_AT_ONCE // self.batch.inputs_BT.numel())
        return [min(chunk, self.samples - done) for done in range(0, self.samples, chunk)]


def bound(problem: Problem) -> NatsAndKL:
    """−ELBO averaged over S draws made after q is final."""
    p = problem
    terms = [elbo_terms(p.model, p.guide, p.batch, p.state.parameters, Draws(n)) for n in p.draws()]
    kl_B = torch.cat([t.kl_B for t in terms]).mean(0)
    return NatsAndKL(kl_B - torch.cat([t.log_likelihood_B for t in terms]).mean(0), kl_B)


def iwae(problem: Problem) -> NatsAndKL:
    r"""−log (1/S) Σ_s p(x, z_s) / q(z_s | x), z_s ~ q after q is final (Burda et al. 2016, arXiv 1509.00519)."""
    p = problem
    weights_SB = torch.cat([log_weights(p.model, p.guide, p.batch, p.state.parameters, n) for n in p.draws()])
    kl_B = elbo_terms(p.model, p.guide, p.batch, p.state.parameters).kl_B
    return NatsAndKL(math.log(p.samples) - weights_SB.logsumexp(0), kl_B)


def prior(problem: Problem) -> NatsAndKL:
    """−log p(x | z) averaged over S draws z ~ p(z): the ELBO of q = p, whose KL is 0."""
    p = problem
    nats_SB = -torch.cat([prior_log_likelihood(p.model, p.batch, n) for n in p.draws()])
    return NatsAndKL(nats_SB.mean(0), torch.zeros_like(nats_SB[0]))


def reused_noise(problem: Problem) -> NatsAndKL:
    """−ELBO at the one draw that the whole fit has seen, as the published code reports it. Not a bound."""
    p = problem
    published = replace(p.inference, noise="reused", particles=1, kl="exact", stop=None)
    state, _ = infer_local(p.model, p.guide, p.batch, published)
    with seeded(state.noise or 0):
        terms = elbo_terms(p.model, p.guide, p.batch, state.parameters)
    return NatsAndKL(-terms.elbo_B, terms.kl_B)


def causal(problem: Problem) -> NatsAndKL:
    r"""−Σ_j log (1/S) Σ_s p(x_j | x_{<j}, z_s), z_s ~ q(z | x_{<j}): block j is scored before q has seen it.

    A true predictive score, as any autoregressive model's; z of the first block comes from the prior, and q goes on
    from block to block. It is no bound on the model's own −log p(x), for it is the score of another distribution over
    texts.
    """
    p, length = problem, problem.batch.inputs_BT.shape[1]
    nats_B, state = torch.zeros_like(p.batch.tokens_B, dtype=torch.get_default_dtype()), None
    for first in range(0, length, p.block):
        block = p.batch.crop(first, min(first + p.block, length))
        if first:
            state, _ = infer_local(p.model, p.guide, p.batch.crop(0, first), replace(p.inference, init=Init()), state)
        log_likelihood_SB = torch.cat([_predicted(p, block, state, n) for n in p.draws()])
        nats_B = nats_B + math.log(p.samples) - log_likelihood_SB.logsumexp(0)
    return NatsAndKL(nats_B, torch.zeros_like(nats_B))


def _predicted(p: Problem, block: Batch, state: LocalState | None, draws: int) -> Float[Tensor, "S B"]:
    """log p(block | z) at draws of q, of the prior where there is none yet."""
    if state is None:
        return prior_log_likelihood(p.model, block, draws)
    return elbo_terms(p.model, p.guide, block, state.parameters, Draws(draws)).log_likelihood_B


class Estimator(NamedTuple):
    """A way to charge a sequence, and whether the charge is an upper bound on −log p(x) in expectation."""

    estimate: Callable[[Problem], NatsAndKL]
    is_bound: bool
    meaning: str


ESTIMATORS = {
    "bound": Estimator(bound, True, "-ELBO with draws made after q is final"),
    "iwae": Estimator(iwae, True, "importance-weighted bound, tighter"),
    "prior": Estimator(prior, True, "the ELBO of q = p(z): no inference"),
    "reused_noise": Estimator(reused_noise, False, "the published code's figure: one draw for fit and score, no bound"),
    "causal": Estimator(causal, False, "predictive: q sees only what came before"),
}
NEED_DENSITY, NEED_NONE = ("bound", "iwae", "reused_noise"), ("prior", "causal")  # of q, and of p without its constant
DEFAULT = ("bound", "iwae", "prior", "reused_noise")  # causal costs a fit per block


@dataclass(frozen=True, kw_only=True)
class Score:
    """One estimator's figures over a whole text; ``stderr`` is over sequences, perplexity is exp(nats per token)."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    stderr_nats_per_token: float
    kl_nats_per_token: float
    samples: int
    is_bound: bool


@dataclass(frozen=True)
class Rate:
    """Nats per token over a whole text, and their standard error over sequences."""

    nats_per_token: float
    stderr_nats_per_token: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was scored, and every estimator's score.

    ``thinking_gain`` is ``prior`` less ``bound``, what inference is worth; None where one of them was not asked for.
    ``excluded`` are the ids of sequences that a estimator found no finite figure for; they count nowhere.
    ``unavailable`` says of a estimator why this model and guide have no such figure.
    """

    tokens: int
    sequences: int
    bytes: int
    excluded: tuple[int, ...]
    estimates: dict[str, Score]
    thinking_gain: Rate | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, ready for JSON: what is no number (a standard error of one sequence) is None."""
        figures = asdict(self)
        for score in (*figures["estimates"].values(), figures["thinking_gain"] or {}):
            score.update({k: None for k, v in score.items() if isinstance(v, float) and not math.isfinite(v)})
        return figures


def check_estimators(names: Sequence[str], samples: int = 1) -> None:
    """Refuses a name that is no estimator, and a figure without a draw."""
    for name in names:
        if name not in ESTIMATORS:
            raise UsageError(f"Unknown estimator '{name}': choose from {', '.join(ESTIMATORS)}.")
    if samples < 1:
        raise UsageError(f"Samples must be at least 1, got {samples}: a bound needs a draw.")


def fit_problem(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    samples: int,
    seed: tuple[int, ...],
    block: int = 16,
) -> Problem:
    """A batch with q fitted to it."""
    with seeded(*seed), torch.no_grad():
        batch = model.prepare(batch)
        state, _ = infer_local(model, guide, batch, inference)
    return Problem(
        model=model, guide=guide, batch=batch, inference=inference, samples=samples, state=state, block=block
    )


def estimate(problem: Problem, estimator: str, seed: tuple[int, ...]) -> NatsAndKL:
    """One estimator's charge; its noise is its own, so that no figure depends on which others are asked for."""
    with seeded(*seed, *estimator.encode()), torch.no_grad():
        return ESTIMATORS[estimator].estimate(problem)


def evaluate(
    model: Model,
    guide: Guide,
    batches: Iterable[Batch],
    inference: LocalInference,
    estimators: Sequence[str] = DEFAULT,
    samples: int = 16,
    seed: int = 0,
    block: int = 16,
) -> Evaluation:
    """Fits q to every batch and scores it; the same seed gives the same figures to the last digit.

    Args:
        samples: S, draws per sequence made after q is final.
        block: tokens of one block of ``causal``.
    """
    check_estimators(estimators, samples)
    estimators = [*dict.fromkeys(estimators)]
    missing = unavailable(model, guide, estimators)
    estimators = [name for name in estimators if name not in missing]
    found: dict[str, list[NatsAndKL]] = {name: [] for name in estimators}
    counts: list[tuple[Tensor, ...]] = []
    for index, batch in enumerate(batches):
        problem = fit_problem(model, guide, batch, inference, samples, (seed, index), block)
        for name in estimators:
            found[name].append(estimate(problem, name, (seed, index)))
        counts.append((batch.tokens_B, batch.bytes_B, batch.ids_B))
    totals = {name: NatsAndKL(*_joined(found)) for name, found in found.items()}
    tokens_B, bytes_B, ids_B = _joined(counts)
    summary = _summary(totals, tokens_B, bytes_B, ids_B, samples)
    if normalisers(model):  # an estimate at best, so that nothing is known to bound anything
        summary.estimates.update({n: replace(score, is_bound=False) for n, score in summary.estimates.items()})
    return replace(summary, unavailable=missing)


def unavailable(model: Model, guide: Guide, estimators: Sequence[str]) -> dict[str, str]:
    """Why some of the estimators have no figure for this model and guide; `UsageError` where none has."""
    reason = missing_bound(model, guide)
    if reason and guide.has_density:
        reason += "; ask for an estimate with --normaliser SAMPLES"
    found = {name: reason for name in estimators if reason and name in NEED_DENSITY}
    if found and len(found) == len(estimators):
        raise UsageError(f"No figure for {', '.join(found)}: {reason}; ask for {', '.join(NEED_NONE)}.")
    return found


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(x).double().cpu() for x in zip(*parts, strict=True)]


def _summary(
    totals: dict[str, NatsAndKL], tokens_B: Tensor, bytes_B: Tensor, ids_B: Tensor, samples: int
) -> Evaluation:
    is_finite_B = torch.stack([t.nats_B.isfinite() for t in totals.values()]).all(0)
    excluded = tuple(int(x) for x in ids_B[~is_finite_B])
    if excluded:
        warnings.warn(f"No finite score for the sequences {list(excluded)}: they are left out.", stacklevel=3)
    if not is_finite_B.any():
        raise UsageError("No sequence has a finite score: the checkpoint or the text is broken; try another.")
    tokens_B, bytes_B = tokens_B[is_finite_B], bytes_B[is_finite_B]
    totals = {name: NatsAndKL(*(x[is_finite_B] for x in t)) for name, t in totals.items()}
    both = {"prior", "bound"} <= totals.keys()
    return Evaluation(
        tokens=int(tokens_B.sum()),
        sequences=len(tokens_B),
        bytes=int(bytes_B.sum()),
        excluded=excluded,
        estimates={name: _score(name, t, tokens_B, bytes_B, samples) for name, t in totals.items()},
        thinking_gain=_rate(totals["prior"].nats_B - totals["bound"].nats_B, tokens_B) if both else None,
    )


def _rate(nats_B: Tensor, tokens_B: Tensor) -> Rate:
    return Rate((nats_B.sum() / tokens_B.sum()).item(), ratio_standard_error(nats_B, tokens_B).item())


def _score(name: str, totals: NatsAndKL, tokens_B: Tensor, bytes_B: Tensor, samples: int) -> Score:
    nats_B, kl_B = totals
    rate = _rate(nats_B, tokens_B)
    total_bytes = bytes_B.sum().item()
    return Score(
        nats_per_token=rate.nats_per_token,
        perplexity=math.exp(rate.nats_per_token) if rate.nats_per_token < 709 else math.inf,
        bits_per_byte=nats_B.sum().item() / math.log(2) / total_bytes if total_bytes else math.nan,
        stderr_nats_per_token=rate.stderr_nats_per_token,
        kl_nats_per_token=(kl_B.sum() / tokens_B.sum()).item(),
        samples=1 if name == "reused_noise" else samples,
        is_bound=ESTIMATORS[name].is_bound,
    )
