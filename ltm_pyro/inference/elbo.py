"""The terms of the ELBO, per sequence and in nats, for any model and any guide.

Shapes: S particles, B sequences.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import reduce
from typing import Any, Literal, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ltm_pyro.contracts import PARTICLES, Batch, Guide, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.antithetic import Antithetic
from ltm_pyro.inference.latent_sites import prior_factors
from ltm_pyro.inference.param_store import no_param_store, param_statements
from ltm_pyro.inference.row_noise import RowNoise
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.utils.rng import seeded

AnyGuide = Callable[[Batch, LocalParameters], Any]  # a `Guide`, or a guide wrapped in a Pyro handler


class ElboTerms(NamedTuple):
    """log p(x | z) and KL(q ‖ p) of each sequence, in nats; with particles, a leading axis S."""

    log_likelihood_B: Float[Tensor, "... B"]
    kl_B: Float[Tensor, "... B"]

    @property
    def elbo_B(self) -> Float[Tensor, "... B"]:
        """log p(x | z) − KL in nats, the objective to maximise."""
        return self.log_likelihood_B - self.kl_B

    def mean(self) -> "ElboTerms":
        """The terms averaged over particles; unchanged if there is no particle axis."""
        return self if self.kl_B.dim() == 1 else ElboTerms(self.log_likelihood_B.mean(0), self.kl_B.mean(0))

    def detach(self) -> "ElboTerms":
        """The terms, detached from the autograd graph."""
        return ElboTerms(self.log_likelihood_B.detach(), self.kl_B.detach())


class Draws(NamedTuple):
    """How the ELBO is estimated.

    Args:
        particles: S, the number of draws of z, as a leading axis; None is one draw without that axis.
        antithetic: draws z in antithetic pairs.
        kl: ``exact`` uses the closed form of a site's KL if torch has one, else log q − log p at the draw; ``sampled``
            uses log q − log p at every site; ``path`` also detaches q's parameters inside log q (arXiv 1703.09194).
        use_thoughts: if False, the decoder does not use z.
        noise: the sequences' own random streams; by default torch's generator.
    """

    particles: int | None = None
    antithetic: bool = False
    kl: Literal["exact", "sampled", "path"] = "exact"
    use_thoughts: bool = True
    noise: RowNoise | None = None


def elbo_terms(
    model: Model,
    guide: AnyGuide,
    batch: Batch,
    local: LocalParameters,
    draws: Draws = Draws(),  # noqa: B008 - immutable
) -> ElboTerms:
    r"""One draw (or S draws) of the ELBO's terms.

    .. math:: \mathrm{ELBO} = E_q[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    The guide is traced and the model replayed with its draws, as in `pyro.infer.Trace_ELBO`; S particles are a plate to
    the left of the plate of sequences. Unlike Pyro's own estimators it never synchronises with the device. Source:
    arXiv 2502.01567, equation 4.
    """
    noise = draws.noise or nullcontext()
    antithetic = Antithetic(draws.noise) if draws.antithetic else nullcontext()
    with no_param_store(model):
        particles = nullcontext() if draws.particles is None else pyro.plate(PARTICLES, draws.particles, dim=-2)
        # antithetic is outside the plate of particles, because Pyro runs inner handlers first and it needs the plate
        with full_precision(batch.inputs_BT), noise, antithetic, particles, poutine.trace() as q:
            guide(batch, local)
        refuse_params(q.trace)
        with particles, poutine.trace() as p, poutine.replay(trace=q.trace):
            model(batch) if draws.use_thoughts else model(batch, use_thoughts=False)  # type: ignore[call-arg]
        prior, posterior = sample_sites(p.trace), latent_sites(q.trace)
        check_sites(posterior, latent_sites(p.trace))
        own = guide.parameters() if isinstance(guide, nn.Module) else ()
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*local.values(), *own)):
            check_reparameterised(posterior)
        log_likelihood_B = sum_log_probs(p.trace, (name for name in prior if name not in posterior))
        with full_precision(batch.inputs_BT):
            if draws.kl == "path":
                fixed = {name: x.detach() for name, x in local.items()}
                with particles, poutine.trace() as q_fixed, poutine.replay(trace=q.trace):
                    guide(batch, fixed)
                posterior = latent_sites(q_fixed.trace)
            kl = _kl if draws.kl == "exact" else _sampled_kl
            kl_B = _sum(kl(site, prior[name]) for name, site in posterior.items())
    return ElboTerms(log_likelihood_B, kl_B.expand_as(log_likelihood_B))


def log_weights(
    model: Model,
    guide: AnyGuide,
    batch: Batch,
    local: LocalParameters,
    particles: int | None = None,
    noise: RowNoise | None = None,
) -> Float[Tensor, "... B"]:
    """log p(x, z) − log q(z | x) at S draws z ~ q, in nats: the log importance weights."""
    return elbo_terms(model, guide, batch, local, Draws(particles, kl="sampled", noise=noise)).elbo_B


def prior_log_likelihood(
    model: Model, batch: Batch, particles: int, noise: RowNoise | None = None
) -> Float[Tensor, "S B"]:
    """log p(x | z) at S draws z ~ p(z), in nats."""
    with no_param_store(model), noise or nullcontext(), pyro.plate(PARTICLES, particles, dim=-2):
        p = poutine.trace(model).get_trace(batch)
    return sum_log_probs(p, (name for name, site in sample_sites(p).items() if site["is_observed"]))


def missing_bound(model: Model, guide: Guide) -> str | None:
    """Why the ELBO of this pair is no bound on log p(x); None if it is one, or if the normaliser is estimated."""
    if not guide.has_density:
        return f"{type(guide).__name__} has no density"
    if any(x.isnan() for x in normalisers(model)):
        return "the prior's normaliser is unknown"
    return None


def normalisers(model: Model) -> list[Tensor]:
    """log C, the log-normaliser of every unnormalised prior of a model; nan if it is not estimated."""
    values = [getattr(part, "log_normaliser", None) for part in model.modules()]
    found = [x for x in values if isinstance(x, Tensor)]
    with seeded(0), torch.no_grad(), no_param_store(model):
        return found if found or not prior_factors(model) else [torch.tensor(torch.nan)]


def refuse_params(trace: Trace) -> None:
    """Raises `UsageError` for a `pyro.param` in a guide, which nothing would learn and no checkpoint would hold."""
    if unknown := param_statements(trace.nodes):
        raise UsageError(
            f"The guide's pyro.param '{next(iter(unknown))}' would not be learned: return what each sequence has of "
            f"its own from init, and derive a guide with global parameters from torch.nn.Module too, with "
            f"torch.nn.Parameter in __init__."
        )


def check_sites(guide: Iterable[str], model: Iterable[str]) -> None:
    """Raises `UsageError` if guide and model do not have the same latent sites."""
    guide, model = set(guide), set(model)
    if missing := sorted(model - guide):
        raise UsageError(
            f"The guide has no site '{missing[0]}', which the model samples; its sites are {sorted(guide)}. "
            f"Sample it in the guide, or marginalise it in the prior."
        )
    if extra := sorted(guide - model):
        raise UsageError(
            f"The guide samples '{extra[0]}', which the model does not have; the model's sites are {sorted(model)}. "
            f"Rename it, or remove it from the guide."
        )


def check_reparameterised(sites: Mapping[str, Any]) -> None:
    """Raises `UsageError` if q has a site whose samples have no gradient, which the fast steps need."""
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise UsageError(
                f"The guide's site '{name}' is a {type(site['fn']).__name__} without reparameterised samples "
                f"(has_rsample is False), so that fast steps would follow a wrong gradient: choose a family that has "
                f"them, such as pyro.distributions.MixtureOfDiagNormals or FlowGuide."
            )


def sample_sites(trace: Trace) -> dict[str, Any]:
    """All sample sites of a trace by name, without the subsample sites of plates."""
    nodes = trace.nodes.items()
    return {name: node for name, node in nodes if node["type"] == "sample" and not site_is_subsample(node)}


def latent_sites(trace: Trace) -> dict[str, Any]:
    """All sample sites of a trace that are not observed, by name."""
    return {name: node for name, node in sample_sites(trace).items() if not node["is_observed"]}


def sum_log_probs(trace: Trace, names: Iterable[str]) -> Float[Tensor, "... B"]:
    """The log-densities at the named sites of a trace, summed, in nats per sequence."""
    return _sum(_log_prob(trace.nodes[name]) for name in names)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _log_prob(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _sampled_kl(q: Any, p: Any) -> Tensor:
    return _log_prob(q) - _log_prob(p)


def _kl(q: Any, p: Any) -> Tensor:
    try:
        return scale_and_mask(kl_divergence(q["fn"], p["fn"]), p["scale"], p["mask"])
    except NotImplementedError:
        return _sampled_kl(q, p)
