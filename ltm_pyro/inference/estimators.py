"""Estimators of −log p(x), in nats per token; some of them are upper bounds in expectation.

Shapes: B sequences, S posterior samples.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import TOKENS, Batch, Guide, Init, LocalParameters, Model, Part
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.ais import Annealing, annealed_path, forward_ais
from ltm_pyro.inference.elbo import (
    Draws,
    elbo_terms,
    log_weights,
    missing_bound,
    normalisers,
    prior_log_likelihood,
    sample_sites,
)
from ltm_pyro.inference.global_latents import fix_draws_by_keys
from ltm_pyro.inference.latent_sites import prior_factors
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.pareto import TRUSTED, pareto_k
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import ratio_standard_error, standard_error

TOKENS_AT_ONCE = 8_192  # tokens x draws in one decoder pass: the logits of a small vocabulary stay in cache


class NatsAndKL(NamedTuple):
    """An estimate of −log p(x) for each sequence, and its KL term, in nats.

    ``kl_stderr_B`` is the Monte Carlo error of the KL, and ``log_weights_SB`` are the weights whose log-mean-exp the
    estimate is; None where an estimator has none.
    """

    nats_B: Float[Tensor, " B"]
    kl_B: Float[Tensor, " B"]
    kl_stderr_B: Float[Tensor, " B"] | None = None
    log_weights_SB: Float[Tensor, "S B"] | None = None

    @classmethod
    def of_weights(cls, log_weights_SB: Float[Tensor, "S B"], kl_B: Float[Tensor, " B"]) -> "NatsAndKL":
        """−log (1/S) Σ_s w_s."""
        nats_B = math.log(len(log_weights_SB)) - log_weights_SB.logsumexp(0)
        return cls(nats_B, kl_B, log_weights_SB=log_weights_SB)

    def curve(self, samples: int) -> Float[Tensor, " B"]:
        """The estimate with fewer samples, averaged over disjoint parts of the weights."""
        assert self.log_weights_SB is not None
        parts = self.log_weights_SB.split(samples)
        whole = torch.stack([part for part in parts if len(part) == samples])
        return (math.log(samples) - whole.logsumexp(1)).mean(0)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch to score, with q fitted to it.

    Args:
        inference: the options that q was fitted with; some estimators fit q again.
        samples: S, draws of z per sequence.
        state: the fitted q; if it has keys, every sequence is scored with a random stream of its own.
        block: tokens per block of `causal`.
        annealing: the path of `ais`.
    """

    model: Model
    guide: Guide
    batch: Batch
    inference: LocalInference
    samples: int
    state: LocalState
    block: int = 16
    annealing: Annealing = field(default_factory=Annealing)

    @property
    def fitted(self) -> tuple[Model, Guide, Batch, LocalParameters]:
        """Model, guide, batch and q's parameters: the arguments of `elbo_terms` and `log_weights`."""
        return self.model, self.guide, self.batch, self.state.parameters

    def draws(self, *purpose: int | str, keys: RowKeys | None = None) -> Iterator[Draws]:
        """S draws in parts that fit in memory.

        Args:
            purpose: what they are for: draws for different purposes are independent.
            keys: instead of those of the state.
        """
        size = max(1, TOKENS_AT_ONCE // self.batch.inputs_BT.numel())
        keys = keys or self.state.keys
        for first in range(0, self.samples, size):
            noise = keys and RowNoise(keys.fold_in(*purpose), first)
            yield Draws(min(size, self.samples - first), noise=noise)


def bound(problem: Problem) -> NatsAndKL:
    """−ELBO averaged over S draws, taken after q is fitted."""
    terms = [elbo_terms(*problem.fitted, draws) for draws in problem.draws("bound")]
    kl_SB = torch.cat([t.kl_B for t in terms])
    log_likelihood_B = torch.cat([t.log_likelihood_B for t in terms]).mean(0)
    return NatsAndKL(kl_SB.mean(0) - log_likelihood_B, kl_SB.mean(0), kl_stderr_B=standard_error(kl_SB))


def iwae(problem: Problem) -> NatsAndKL:
    r"""−log (1/S) Σ_s p(x, z_s) / q(z_s | x), z_s ~ q(z | x) (Burda et al. 2016, arXiv 1509.00519)."""
    log_weights_SB = torch.cat([log_weights(*problem.fitted, x.particles, x.noise) for x in problem.draws("iwae")])
    kl_B = elbo_terms(*problem.fitted, next(problem.draws("kl"))._replace(particles=None)).kl_B
    return NatsAndKL.of_weights(log_weights_SB, kl_B)


def prior_iwae(problem: Problem) -> NatsAndKL:
    r"""−log (1/S) Σ_s p(x | z_s), z_s ~ p(z): `iwae` with the prior as q, so without inference."""
    log_weights_SB = _prior_log_likelihood(problem, "prior_iwae")
    return NatsAndKL.of_weights(log_weights_SB, torch.zeros_like(log_weights_SB[0]))


def ais(problem: Problem) -> NatsAndKL:
    """Annealed importance sampling from q to the posterior: `ltm_pyro.inference.ais`, S chains."""
    keys = problem.state.keys
    path = annealed_path(*problem.fitted, problem.annealing, keys)
    log_weights_SB = torch.cat([forward_ais(path, x.particles or 1, x.noise) for x in problem.draws("ais")])
    return NatsAndKL.of_weights(log_weights_SB, torch.zeros_like(log_weights_SB[0]))


def prior(problem: Problem) -> NatsAndKL:
    """−log p(x | z) averaged over S draws z ~ p(z): −ELBO of q = p(z), whose KL is 0."""
    nats_SB = -_prior_log_likelihood(problem, "prior")
    return NatsAndKL(nats_SB.mean(0), torch.zeros_like(nats_SB[0]))


def _prior_log_likelihood(problem: Problem, *purpose: int | str, keys: RowKeys | None = None) -> Float[Tensor, "S B"]:
    """log p(x | z) at S draws from the prior."""
    draws = problem.draws(*purpose, keys=keys)
    return torch.cat([prior_log_likelihood(problem.model, problem.batch, x.particles or 1, x.noise) for x in draws])


def reused_noise(problem: Problem) -> NatsAndKL:
    """−ELBO at the same draw that q was fitted to, as the published code reports it. Not a bound."""
    published = replace(problem.inference, noise="reused", particles=1, kl="exact", stop=None)
    keys = problem.state.keys
    state, _ = infer_local(problem.model, problem.guide, problem.batch, published, keys=keys)
    with seeded(state.noise or 0):
        terms = elbo_terms(*replace(problem, state=state).fitted, published.draws_of_step(state))
    return NatsAndKL(-terms.elbo_B, terms.kl_B)


def causal(problem: Problem) -> NatsAndKL:
    r"""−Σ_j log (1/S) Σ_s p(x_j | x_{<j}, z_s), z_s ~ q(z | x_{<j}): q is fitted only to the blocks before block j.

    It is the negative log-likelihood of a valid autoregressive model, but not a bound on the −log p(x) of the given
    model, because that autoregressive model is another distribution over texts. For the first block z is drawn from the
    prior. Each fit of q starts from the previous one.
    """
    batch, length, keys = problem.batch, problem.batch.inputs_BT.shape[1], problem.state.keys
    nats_B, state = torch.zeros_like(batch.tokens_B, dtype=torch.get_default_dtype()), None
    for first in range(0, length, problem.block):
        if first:
            before, inference = batch.crop(0, first), replace(problem.inference, init=Init())
            before_keys = keys and RowKeys.of_batch(before.observed, keys.seed)  # q may not see the rest of the text
            state, _ = infer_local(problem.model, problem.guide, before, inference, state, keys=before_keys)
        last = min(first + problem.block, length)
        block = replace(problem, batch=batch.crop(first, last), state=state or problem.state)
        block_keys = keys and RowKeys.of_batch(batch.crop(0, last), keys.seed)  # later tokens do not change a block
        if state is None:
            log_likelihood_SB = _prior_log_likelihood(block, "causal", keys=block_keys)
        else:
            terms = [elbo_terms(*block.fitted, draws) for draws in block.draws("causal", keys=block_keys)]
            log_likelihood_SB = torch.cat([x.log_likelihood_B for x in terms])
        nats_B = nats_B + math.log(problem.samples) - log_likelihood_SB.logsumexp(0)
    return NatsAndKL(nats_B, torch.zeros_like(nats_B))


class Estimator(NamedTuple):
    """An estimator of −log p(x), and whether it is an upper bound in expectation."""

    estimate: Callable[[Problem], NatsAndKL]
    is_bound: bool
    meaning: str


ESTIMATORS = {
    "bound": Estimator(bound, True, "-ELBO at draws taken after q is fitted"),
    "iwae": Estimator(iwae, True, "importance-weighted bound, tighter than bound"),
    "prior": Estimator(prior, True, "the ELBO of q = p(z): no inference"),
    "prior_iwae": Estimator(prior_iwae, True, "importance-weighted bound with q = p(z): no inference"),
    "ais": Estimator(ais, True, "annealed importance sampling from q to the posterior: the tightest, and slow"),
    "reused_noise": Estimator(reused_noise, False, "the published code's figure: one draw for fit and score, no bound"),
    "causal": Estimator(causal, False, "predictive: q is fitted only to the text before"),
}
NEED_DENSITY = ("bound", "iwae", "ais", "reused_noise")  # the normalised densities of q and of the prior
NEED_NONE = ("prior", "prior_iwae", "causal")  # only draws, of the prior among others
NEARLY_ALL = 0.95  # the share of sequences whose k-hat has to be good
DEFAULT = ("bound", "iwae", "prior", "reused_noise")  # without causal, which needs a fit per block


@dataclass(frozen=True, kw_only=True)
class Score:
    """One estimator's results over a whole text; perplexity is exp(nats per token).

    ``stderr`` is over documents, whose pieces are not independent; over sequences if the data do not tell them.

    ``converged`` says whether an average of importance weights can be trusted, None for other estimators: k-hat is
    below min(1 − 1 / log10 S, 0.7) for nearly all sequences (Vehtari et al. 2024, arXiv 1507.02646), or `ais` agrees
    within its error. ``curve`` has the nats per token by number of samples.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    stderr_nats_per_token: float
    kl_nats_per_token: float
    samples: int
    is_bound: bool
    converged: bool | None = None
    curve: dict[int, float] = field(default_factory=dict)


class RowScores(NamedTuple):
    """Every sequence's id, documents (None if not known), tokens, and nats and KL by estimator."""

    ids_B: Tensor
    parts: tuple[tuple[Part, ...], ...] | None
    tokens_B: Tensor
    scores: dict[str, NatsAndKL]

    @property
    def pieces(self) -> list[Part] | None:
        """The document of each sequence, or the piece of one; None if a sequence is not of one document alone."""
        return [x[0] for x in self.parts] if self.parts and all(len(x) == 1 for x in self.parts) else None


@dataclass(frozen=True)
class Rate:
    """Nats per token over a whole text, and the standard error over documents (or sequences: see `Score`)."""

    nats_per_token: float
    stderr_nats_per_token: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The size of the text that was scored, and the score of every estimator.

    ``thinking_gain`` is ``prior`` − ``bound``, the improvement by inference; None if one of them was not requested.
    ``excluded`` are the ids of sequences with a non-finite estimate; no score includes them. ``unavailable`` maps an
    estimator's name to the reason why it is not defined for this model and guide. ``rows`` are the figures of every
    sequence.
    """

    tokens: int
    documents: int | None  # None if the data do not tell them
    sequences: int
    bytes: int
    excluded: tuple[int, ...]
    estimates: dict[str, Score]
    thinking_gain: Rate | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    rows: "RowScores | None" = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries for JSON, without ``rows``; non-finite numbers become None."""
        result = asdict(replace(self, rows=None))
        del result["rows"]
        for score in (*result["estimates"].values(), result["thinking_gain"] or {}):
            score.update({k: None for k, v in score.items() if isinstance(v, float) and not math.isfinite(v)})
        return result


def check_estimators(names: Sequence[str], samples: int = 1) -> None:
    """Raises `UsageError` for an unknown estimator, or for fewer than one sample."""
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
    seed: int = 0,
    block: int = 16,
    annealing: Annealing = Annealing(),  # noqa: B008 - immutable
) -> Problem:
    """Fits q to a batch; each sequence has a random stream of its own, which depends on the seed and its tokens."""
    with torch.no_grad():
        batch = model.prepare(batch)
        state, _ = infer_local(model, guide, batch, inference, keys=RowKeys.of_batch(batch.observed, seed))
        if (
            batch.observed_BT is not None
        ):  # draws for the figure are of the whole row: equal prompts are not equal texts
            state = state._replace(keys=RowKeys.of_batch(batch, seed))
    return Problem(
        model=model,
        guide=guide,
        batch=batch,
        inference=inference,
        samples=samples,
        state=state,
        block=block,
        annealing=annealing,
    )


def estimate(problem: Problem, estimator: str) -> NatsAndKL:
    """One estimator's result, at one draw of the global latent variables."""
    with fix_draws_by_keys(problem.model, problem.state.keys), torch.no_grad():
        return ESTIMATORS[estimator].estimate(problem)


def evaluate(
    model: Model,
    guide: Guide,
    batches: Iterable[Batch],
    inference: LocalInference,
    estimators: Sequence[str] = DEFAULT,
    samples: int | Sequence[int] = 16,
    seed: int = 0,
    block: int = 16,
    annealing: Annealing = Annealing(),  # noqa: B008 - immutable
) -> Evaluation:
    """Fits q to every batch and scores it.

    A sequence's score depends on the model, its tokens, the options and the random seed, and on nothing else: not on
    its batch, nor on the other estimators. Equal sequences have equal scores.

    Args:
        samples: S, draws of z per sequence; of several numbers the largest, and the others are points of
            `Score.curve`.
        block: tokens per block of `causal`.
        annealing: the path of `ais`.
    """
    points = [samples] if isinstance(samples, int) else [*samples]
    check_estimators(estimators, min(points, default=0))
    samples = max(points)
    estimators = [*dict.fromkeys(estimators)]
    missing = unavailable(model, guide, estimators)
    estimators = [name for name in estimators if name not in missing]
    results: dict[str, list[NatsAndKL]] = {name: [] for name in estimators}
    counts: list[tuple[Tensor, ...]] = []
    parts: list[tuple[tuple[Part, ...], ...] | None] = []
    not_normalised: str | None = None
    for batch in batches:
        problem = fit_problem(model, guide, batch, inference, samples, seed, block, annealing)
        for name in estimators:
            results[name].append(estimate(problem, name))
        counts.append((batch.tokens_B, batch.bytes_B, batch.ids_B))
        parts.append(batch.parts)
        if not_normalised is None:
            not_normalised = _likelihood_problem(problem)
    nats_and_kl = {name: NatsAndKL(*_concatenate(parts)) for name, parts in results.items()}
    tokens_B, bytes_B, ids_B = _concatenate(counts)
    documents = None if None in parts else tuple(row for found in parts for row in found or ())
    rows = RowScores(ids_B, documents, tokens_B, nats_and_kl)
    evaluation = _summarise(rows, bytes_B, points)
    not_normalised = not_normalised or _negative_kl(nats_and_kl)
    if not_normalised:
        warnings.warn(f"No figure is a bound: {not_normalised}.", stacklevel=2)
    if normalisers(model) or not_normalised:  # an estimated normaliser: no score is known to be a bound
        scores = {name: replace(score, is_bound=False) for name, score in evaluation.estimates.items()}
        evaluation = replace(evaluation, estimates=scores)
    return replace(evaluation, unavailable=missing, rows=rows)


def unavailable(model: Model, guide: Guide, estimators: Sequence[str]) -> dict[str, str]:
    """Why some of the estimators are not defined for this model and guide; raises `UsageError` if none of them is."""
    reason = missing_bound(model, guide)
    if reason and guide.has_density:
        reason += "; ask for an estimate with --normaliser SAMPLES"
    missing = {name: reason for name in estimators if reason and name in NEED_DENSITY}
    with seeded(0), torch.no_grad(), no_param_store(model):
        factors = [*prior_factors(model)]
    if factors:  # which draws from the prior's sites leave out
        missing |= {
            n: f"the prior's factor '{factors[0]}' leaves it without draws" for n in estimators if n in NEED_NONE
        }
    if missing and len(missing) == len(estimators):
        advice = NEED_DENSITY if factors else NEED_NONE
        raise UsageError(f"No figure for {', '.join(missing)}: {missing[estimators[0]]}; ask for {', '.join(advice)}.")
    return missing


def _likelihood_problem(problem: Problem) -> str | None:
    """Why p(x | z) is no distribution over texts; None if nothing speaks against it."""
    model, batch = problem.model, problem.batch.select(torch.tensor([0], device=problem.batch.inputs_BT.device))
    with no_param_store(model), seeded(0), torch.no_grad():
        nodes = sample_sites(poutine.trace(model).get_trace(batch))
    for name, node in nodes.items():
        if isinstance(node["scale"], Tensor) or node["scale"] != 1:
            return f"the model scales site '{name}' by {node['scale']}"
        if node["mask"] is not None and node["mask"] is not True:
            return f"the model masks site '{name}'"
    fn, value = nodes[TOKENS]["fn"], nodes[TOKENS]["value"]
    log_p = getattr(fn, "base_dist", fn).log_prob(value)
    if not value.is_floating_point() and (log_p > 1e-4).any():
        return f"a token has the probability {log_p.max().exp().item():.3g} under p(x | z)"
    return None


def _negative_kl(results: dict[str, NatsAndKL]) -> str | None:
    """The alarm that sees every density that is none: a KL cannot be negative by more than its error."""
    for result in results.values():
        if result.kl_stderr_B is None:
            continue
        kl, error = result.kl_B.sum().item(), result.kl_stderr_B.square().sum().sqrt().nan_to_num(torch.inf).item()
        if kl < -4 * error - 1e-4 * len(result.kl_B):
            return f"the KL is {kl:.4g} nats, which no density has (standard error {error:.2g})"
    return None


def _concatenate(parts: Sequence[tuple[Tensor | None, ...]]) -> list[Any]:
    columns = zip(*parts, strict=True)
    return [None if x[0] is None else torch.cat(x, dim=-1).double().cpu() for x in columns]


def _summarise(rows: RowScores, bytes_B: Tensor, points: Sequence[int]) -> Evaluation:
    is_finite_B = torch.stack([t.nats_B.isfinite() for t in rows.scores.values()]).all(0)
    excluded = tuple(int(x) for x in rows.ids_B[~is_finite_B])
    if excluded:
        warnings.warn(f"No finite score for the sequences {list(excluded)}: they are left out.", stacklevel=3)
    if not is_finite_B.any():
        raise UsageError("No sequence has a finite score: the checkpoint or the text is broken; try another.")
    pieces = rows.pieces
    numbers_B = rows.ids_B if pieces is None else torch.tensor([piece.number for piece in pieces])
    tokens_B, bytes_B, documents_B = (x[is_finite_B] for x in (rows.tokens_B, bytes_B, numbers_B))
    results = {
        name: NatsAndKL._make(x if x is None else x[..., is_finite_B] for x in t) for name, t in rows.scores.items()
    }
    rate = partial(rate_of, tokens_B=tokens_B, documents_B=documents_B)
    has_gain, ais = {"prior", "bound"} <= results.keys(), results.get("ais")
    return Evaluation(
        tokens=int(tokens_B.sum()),
        documents=None if pieces is None else len(documents_B.unique()),
        sequences=len(tokens_B),
        bytes=int(bytes_B.sum()),
        excluded=excluded,
        estimates={n: _score(n, t, rate(t.nats_B), tokens_B, bytes_B, points, ais) for n, t in results.items()},
        thinking_gain=rate(results["prior"].nats_B - results["bound"].nats_B) if has_gain else None,
    )


def rate_of(nats_B: Tensor, tokens_B: Tensor, documents_B: Tensor | None = None) -> Rate:
    """Nats per token of all sequences; ``documents_B`` has the same number for the pieces of one document."""
    return Rate((nats_B.sum() / tokens_B.sum()).item(), ratio_standard_error(nats_B, tokens_B, documents_B).item())


def is_converged(result: NatsAndKL, reference: NatsAndKL | None = None) -> bool:
    """Whether an average of importance weights can be trusted, as `Score.converged` says."""
    log_weights_SB = cast(Tensor, result.log_weights_SB)
    samples = len(log_weights_SB)
    if samples >= 25:
        limit = min(1 - 1 / math.log10(samples), TRUSTED)
        if (pareto_k(log_weights_SB) < limit).double().mean() >= NEARLY_ALL:
            return True
    if reference is None or reference is result or len(cast(Tensor, reference.log_weights_SB)) < 2:
        return False
    weights_SB = cast(Tensor, reference.log_weights_SB).softmax(0) * len(cast(Tensor, reference.log_weights_SB))
    error = standard_error(weights_SB).square().sum().sqrt()
    return bool((result.nats_B.sum() - reference.nats_B.sum()).abs() < 2 * error)


def _score(
    name: str,
    result: NatsAndKL,
    rate: Rate,
    tokens_B: Tensor,
    bytes_B: Tensor,
    points: Sequence[int],
    reference: NatsAndKL | None,
) -> Score:
    nats_B, kl_B, samples = result.nats_B, result.kl_B, max(points)
    has_weights = result.log_weights_SB is not None
    total_bytes = bytes_B.sum().item()
    return Score(
        nats_per_token=rate.nats_per_token,
        perplexity=math.exp(rate.nats_per_token) if rate.nats_per_token < 709 else math.inf,
        bits_per_byte=nats_B.sum().item() / math.log(2) / total_bytes if total_bytes else math.nan,
        stderr_nats_per_token=rate.stderr_nats_per_token,
        kl_nats_per_token=(kl_B.sum() / tokens_B.sum()).item(),
        samples=1 if name == "reused_noise" else samples,
        is_bound=ESTIMATORS[name].is_bound,
        converged=is_converged(result, reference) if has_weights else None,
        curve={n: (result.curve(n).sum() / tokens_B.sum()).item() for n in sorted(points)} if has_weights else {},
    )
