"""Estimators of −log p(x), in nats per token; some of them are upper bounds in expectation.

Shapes: B sequences, S posterior samples.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
from ltm_pyro.inference.latent_sites import is_factor, prior_factors
from ltm_pyro.inference.local import infer_local, number_of_starts, passes_of_fit
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.scores import Evaluation, NatsAndKL, RowScores, summarise
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import clustered_mean, standard_error
from ltm_pyro.utils.threads import one_at_a_time

TOKENS_AT_ONCE = 8_192  # tokens x draws in one decoder pass: the logits of a small vocabulary stay in cache


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
    nats_SB = kl_SB - torch.cat([t.log_likelihood_B for t in terms])
    strata = problem.guide.strata
    whole_SB = nats_SB[: len(nats_SB) // strata * strata].unflatten(0, (-1, strata)).mean(1)  # independent draws
    error_B, kl_error_B = standard_error(whole_SB), standard_error(kl_SB)
    return NatsAndKL(nats_SB.mean(0), kl_SB.mean(0), kl_stderr_B=kl_error_B, nats_stderr_B=error_B)


def shuffled(problem: Problem) -> NatsAndKL:
    """`bound` under another text's q, that of the sequence half a batch further on; `prior` if there is no other."""
    if problem.batch.size == 1:
        nats_SB = -_prior_log_likelihood(problem, "prior")
        zeros_B = torch.zeros_like(nats_SB[0])
        return NatsAndKL(nats_SB.mean(0), zeros_B, kl_stderr_B=zeros_B, nats_stderr_B=standard_error(nats_SB))
    order_B = torch.arange(problem.batch.size, device=problem.batch.inputs_BT.device).roll(problem.batch.size // 2)
    return bound(replace(problem, state=problem.state.select(order_B)))


def iwae(problem: Problem) -> NatsAndKL:
    r"""−log (1/S) Σ_s p(x, z_s) / q(z_s | x), z_s ~ q(z | x) (Burda et al. 2016, arXiv 1509.00519)."""
    log_weights_SB = torch.cat([log_weights(*problem.fitted, x.particles, x.noise) for x in problem.draws("iwae")])
    kl_B = elbo_terms(*problem.fitted, next(problem.draws("kl"))._replace(particles=None)).kl_B
    return NatsAndKL.of_weights(log_weights_SB[:, None], kl_B)


def prior_iwae(problem: Problem) -> NatsAndKL:
    r"""−log (1/S) Σ_s p(x | z_s), z_s ~ p(z): `iwae` with the prior as q, so without inference."""
    return NatsAndKL.of_weights(_prior_log_likelihood(problem, "prior_iwae")[:, None])


def ais(problem: Problem) -> NatsAndKL:
    """Annealed importance sampling from q to the posterior: `ltm_pyro.inference.ais`, S chains."""
    keys = problem.state.keys
    path = annealed_path(*problem.fitted, problem.annealing, keys)
    log_weights_SB = torch.cat([forward_ais(path, x.particles or 1, x.noise) for x in problem.draws("ais")])
    return NatsAndKL.of_weights(log_weights_SB[:, None])


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
    published = replace(problem.inference, noise="reused", starts=1, particles=1, kl="exact", stop=None)
    keys = problem.state.keys
    state, _ = infer_local(problem.model, problem.guide, problem.batch, published, keys=keys)
    with seeded(state.noise or 0):
        terms = elbo_terms(*replace(problem, state=state).fitted, published.draws_of_step(state))
    return NatsAndKL(-terms.elbo_B, terms.kl_B)


def causal(problem: Problem, infer: bool = True) -> NatsAndKL:
    r"""−Σ_j log (1/S) Σ_s p(x_j | x_{<j}, z_s), z_s ~ q(z | x_{<j}): q is fitted only to the blocks before block j.

    It is the negative log-likelihood of a valid autoregressive model, but not a bound on the −log p(x) of the given
    model, because that autoregressive model is another distribution over texts. For the first block z is drawn from the
    prior. Each fit of q starts from the previous one, or anew where q has several starts.

    Args:
        infer: if False, z comes from the prior for every block (`causal_prior`).
    """
    batch, length, keys = problem.batch, problem.batch.inputs_BT.shape[1], problem.state.keys
    log_likelihoods: list[Float[Tensor, "S B"]] = []
    state: LocalState | None = None
    goes_on = number_of_starts(problem.model, problem.guide, problem.inference) == 1
    for first in range(0, length, problem.block):
        if first and infer:
            before, inference = batch.crop(0, first), replace(problem.inference, init=Init())
            before_keys = keys and RowKeys.of_batch(before.observed, keys.seed)  # q may not see the rest of the text
            previous = state if goes_on else None
            state, _ = infer_local(problem.model, problem.guide, before, inference, previous, keys=before_keys)
        last = min(first + problem.block, length)
        block = replace(problem, batch=batch.crop(first, last), state=state or problem.state)
        block_keys = keys and RowKeys.of_batch(batch.crop(0, last), keys.seed)  # later tokens do not change a block
        if state is None:
            log_likelihood_SB = _prior_log_likelihood(block, "causal", keys=block_keys)
        else:
            terms = [elbo_terms(*block.fitted, draws) for draws in block.draws("causal", keys=block_keys)]
            log_likelihood_SB = torch.cat([x.log_likelihood_B for x in terms])
        log_likelihoods.append(log_likelihood_SB)
    return NatsAndKL.of_weights(torch.stack(log_likelihoods, 1))


def causal_prior(problem: Problem) -> NatsAndKL:
    r"""−Σ_j log (1/S) Σ_s p(x_j | x_{<j}, z_s), z_s ~ p(z): `causal` without inference, in the same blocks."""
    return causal(problem, infer=False)


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
    "causal_prior": Estimator(causal_prior, False, "causal without inference; less causal: the predictive gain"),
    "shuffled": Estimator(shuffled, True, "bound under another text's q: what it is if thoughts carry nothing"),
}
NEED_DENSITY = ("bound", "shuffled", "iwae", "ais", "reused_noise")  # the normalised densities of q and of the prior
NEED_NONE = ("prior", "prior_iwae", "causal", "causal_prior")  # only draws, of the prior among others
DEFAULT = ("bound", "iwae", "prior", "reused_noise")  # without causal, which needs a fit per block
OF_A_BATCH = ("shuffled",)  # figures that are of several texts, and of no text by itself
AVERAGES = ("iwae", "prior_iwae", "ais", "causal", "causal_prior")  # over draws, so that they have a curve


def check_estimators(names: Sequence[str], samples: int = 1) -> None:
    """Raises `UsageError` for an unknown estimator, or for fewer than one sample."""
    for name in names:
        if name not in ESTIMATORS:
            raise UsageError(f"Unknown estimator '{name}': choose from {', '.join(ESTIMATORS)}.")
    if samples < 1:
        raise UsageError(f"Samples must be at least 1, got {samples}: a bound needs a draw.")


@one_at_a_time
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


@one_at_a_time
def estimate(problem: Problem, estimator: str) -> NatsAndKL:
    """One estimator's result, at one draw of the global latent variables."""
    with fix_draws_by_keys(problem.model, problem.state.keys), torch.no_grad():
        return ESTIMATORS[estimator].estimate(problem)


class _BatchScores(NamedTuple):
    """What `evaluate` needs of one batch; ``largest_log_p`` is that of a token, ``reason`` why there is no bound."""

    results: dict[str, NatsAndKL]
    counts: tuple[Tensor, Tensor, Tensor]
    parts: tuple[tuple[Part, ...], ...] | None
    largest_log_p: Tensor
    reason: str | None
    negative_kl: str | None


@one_at_a_time
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
    mapper: Callable[..., Iterable[_BatchScores]] = map,
) -> Evaluation:
    """Fits q to every batch and scores it.

    A sequence's score depends on the model, its tokens, the options and the random seed, and on nothing else: not on
    its batch, nor on the other estimators. Equal sequences have equal scores. ``shuffled`` alone is of a whole batch.

    Args:
        samples: S, draws of z per sequence; of several numbers the largest, and the others are points of
            `Score.curve`.
        block: tokens per block of `causal` and `causal_prior`.
        annealing: the path of `ais`.
        mapper: computes a function of every batch, as `map` does; `track_map` does so in several processes.
    """
    points = [samples] if isinstance(samples, int) else [*samples]
    check_estimators(estimators, min(points, default=0))
    samples = max(points)
    estimators = [*dict.fromkeys(estimators)]
    missing = unavailable(model, guide, estimators)
    estimators = [name for name in estimators if name not in missing]
    ask_kl = any(ESTIMATORS[name].is_bound for name in estimators)

    def score_batch(numbered: tuple[int, Batch]) -> _BatchScores:
        number, batch = numbered
        problem = fit_problem(model, guide, batch, inference, samples, seed, block, annealing)
        results = {name: estimate(problem, name) for name in estimators}
        reason, largest_log_p = _likelihood_problem(problem)
        knows_error = samples > 1 and any(found.kl_stderr_B is not None for found in results.values())
        negative_kl = None if number or knows_error or not ask_kl else _negative_kl_of_draws(problem)
        counts = (batch.tokens_B, batch.bytes_B, batch.ids_B)
        return _BatchScores(results, counts, batch.parts, largest_log_p, reason, negative_kl)

    scored = [*mapper(score_batch, enumerate(batches))]
    nats_and_kl = {name: NatsAndKL.concatenate([x.results[name] for x in scored]) for name in estimators}
    counts = zip(*(x.counts for x in scored), strict=True)
    tokens_B, bytes_B, ids_B = (torch.cat(column).double().cpu() for column in counts)
    parts = [x.parts for x in scored]
    documents = None if None in parts else tuple(row for found in parts for row in found or ())
    rows = RowScores(ids_B, documents, tokens_B, bytes_B, nats_and_kl)
    known = ((x.kl_B, x.kl_stderr_B) for x in nats_and_kl.values() if x.kl_stderr_B is not None)
    of_estimators = next((alarm for kl_B, error_B in known if (alarm := _negative_kl(kl_B, error_B))), None)
    not_normalised = next((x.reason for x in scored if x.reason), None)
    largest_p = torch.stack([x.largest_log_p for x in scored]).max().exp().item()  # the device is waited for only here
    if not not_normalised and largest_p > 1 + 1e-4:
        not_normalised = f"a token has the probability {largest_p:.3g} under p(x | z)"
    not_normalised = not_normalised or of_estimators or next((x.negative_kl for x in scored if x.negative_kl), None)
    if not_normalised:
        warnings.warn(f"No figure is a bound: {not_normalised}.", stacklevel=2)
    is_density = not (normalisers(model) or not_normalised)  # with an estimated normaliser no score is a known bound
    are_bounds = {name: is_density and ESTIMATORS[name].is_bound for name in estimators}
    found = summarise(rows, points, are_bounds, passes_of_fit(model, guide, inference))
    worse = _worse_than_prior(rows)
    return replace(found, unavailable=missing, worse_than_prior=worse, no_bound=not_normalised, rows=rows)


@one_at_a_time
def unavailable(model: Model, guide: Guide, estimators: Sequence[str]) -> dict[str, str]:
    """Why some of the estimators are not defined for this model and guide; raises `UsageError` if none of them is."""
    reason = missing_bound(model, guide)
    if reason and guide.has_density:
        reason += "; ask for an estimate with --normaliser SAMPLES"
    missing = {name: reason for name in estimators if reason and name in NEED_DENSITY}
    if only_bound := getattr(model, "only_bound", None):
        missing |= {name: only_bound for name in estimators if name != "bound"}
    with seeded(0), torch.no_grad(), no_param_store(model):
        factors = [*prior_factors(model)]
    if factors:  # which draws from the prior's sites leave out
        missing |= {
            n: f"the prior's factor '{factors[0]}' leaves it without draws" for n in estimators if n in NEED_NONE
        }
    if missing and len(missing) == len(estimators):
        advice = ("bound",) if only_bound else NEED_DENSITY if factors else NEED_NONE
        left = [name for name in advice if name not in missing]
        ask = f"; ask for {', '.join(left)}" if left else ""
        raise UsageError(f"No figure for {', '.join(missing)}: {missing[estimators[0]]}{ask}.")
    return missing


@torch.no_grad()
def _likelihood_problem(problem: Problem) -> tuple[str | None, Tensor]:
    """Why p(x | z) is no distribution over texts by its sites, None if it may be one; largest log p of a token."""
    model, batch = problem.model, problem.batch
    with no_param_store(model), seeded(0):
        nodes, of_prior = sample_sites(poutine.trace(model).get_trace(batch)), {*prior_factors(model)}
    found: list[str] = []
    for name, node in nodes.items():
        if is_factor(node) and name not in of_prior:
            found.append(f"the model adds the factor '{name}' to its log-density")
        elif isinstance(node["scale"], Tensor) or node["scale"] != 1:
            found.append(f"the model scales site '{name}' by {node['scale']}")
        elif node["mask"] is not None and node["mask"] is not True:
            found.append(f"the model masks site '{name}'")
    fn, value = nodes[TOKENS]["fn"], nodes[TOKENS]["value"]
    log_p = getattr(fn, "base_dist", fn).log_prob(value)
    return next(iter(found), None), log_p.new_zeros(()) if value.is_floating_point() else log_p.max()


def _worse_than_prior(rows: RowScores) -> str | None:
    """What to do where the ELBO of the fitted q is below that of q = p(z), by three standard errors."""
    fitted, without = rows.scores.get("bound"), rows.scores.get("prior")
    if fitted is None or without is None or not rows.is_finite_B.any():
        return None
    keep_B = rows.is_finite_B
    worse, error, *_ = clustered_mean((fitted.nats_B - without.nats_B)[keep_B], rows.documents_B[keep_B])
    if not worse > 3 * error:
        return None
    return (
        f"q ends worse than the prior, by {worse:.2f} nats per sequence (standard error {error:.2f}): give the fit "
        f"more fast steps, several starts (`starts`), or a narrower first q (`init.log_var`)."
    )


def _negative_kl_of_draws(problem: Problem, draws: int = 16) -> str | None:
    """The same alarm by some draws of q for the first batch: not every estimator tells the error of its KL."""
    if missing_bound(problem.model, problem.guide):
        return None
    size = max(1, TOKENS_AT_ONCE // problem.batch.inputs_BT.numel())
    noise = problem.state.keys and RowNoise(problem.state.keys.fold_in("density"))
    with torch.no_grad(), fix_draws_by_keys(problem.model, problem.state.keys):
        kl_SB = elbo_terms(*problem.fitted, Draws(max(2, min(draws, size)), kl="sampled", noise=noise)).kl_B
    return _negative_kl(kl_SB.mean(0), standard_error(kl_SB))


def _negative_kl(kl_B: Float[Tensor, " B"], error_B: Float[Tensor, " B"]) -> str | None:
    """The alarm that sees every density that is none: a KL cannot be negative by more than its error."""
    kl, error = kl_B.sum().item(), error_B.square().sum().sqrt().nan_to_num(torch.inf).item()
    if kl < -4 * error - 1e-4 * len(kl_B):
        return f"the KL is {kl:.4g} nats, which no density has (standard error {error:.2g})"
    return None
