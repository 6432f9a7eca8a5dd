"""Is local inference right? Every shipped guide on models whose posterior and evidence are known.

Shapes: B sequences, N latent coordinates, S posterior samples.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from ltm_pyro.contracts import Batch, Guide, Init, Model, ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import BlockCovariance, FlowGuide, FullCovariance, JointCovariance, Laplace, LowRank, MeanField
from ltm_pyro.inference.elbo import log_weights
from ltm_pyro.inference.estimators import ESTIMATORS, Problem
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import TRUSTED, pareto_k
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.models import LinearGaussianModel, TwoModesModel
from ltm_pyro.models.linear_gaussian import Gaussian
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import standard_error
from ltm_pyro.utils.threads import one_at_a_time

SHAPE = ThoughtShape(2, 1, 3)
SEQUENCES, SAMPLES, REPEATS = 8, 5_000, 10
BOUNDS = ("bound", "iwae", "prior")
COARSE = LocalInference(steps=500, rate=0.05, noise="reused", init=Init(log_var=0.0))  # as in the published code


@dataclass(frozen=True, kw_only=True)
class Case:
    """A guide, how it is fitted, and the best Gaussian of its family on the linear-Gaussian model, with its name."""

    guide: Callable[[Model], Guide]
    inference: LocalInference
    truth: Callable[[LinearGaussianModel, Batch], Gaussian] = LinearGaussianModel.posterior
    best: str = "the posterior"


# the path-wise KL has no noise once q is the posterior
EXACT = LocalInference(steps=300, rate=0.1, optimizer="natural", particles=64, noise="antithetic", kl="path")
# exact KL and antithetic draws: no noise in the means; many draws and a falling rate let the variances converge
FACTORISED = LocalInference(steps=1200, rate=0.1, optimizer="natural", particles=1024, noise="antithetic")
NOISY = LocalInference(steps=600, rate=0.05, particles=64, kl="path")
WITHOUT_DRAWS = LocalInference(steps=2000, rate=0.1)  # without draws there is no noise

BEST = "the best factorised Gaussian"
CLOSE = {"mean": 0.05, "variance": 0.05, "covariance": 0.05}  # mean in prior sd, others relative: a good fit
LEFT_OUT = {  # shipped guides that this cannot judge
    "Amortized": "its encoder has to be trained first; `ltm calibrate RUN` judges a trained one",
    "Masking": "it draws which tokens are masked, and infers nothing",
    "Langevin": "its draws have no density; `ltm calibrate RUN` judges them",
    "Point": "one point, without a spread; Laplace gives it one",
}
CASES = {  # all other shipped guides
    "MeanField": Case(guide=MeanField, inference=FACTORISED, truth=LinearGaussianModel.factorised, best=BEST),
    "BlockCovariance": Case(
        guide=BlockCovariance,
        inference=FACTORISED,
        truth=lambda model, batch: model.factorised(batch, block=SHAPE.width),
        best="the best Gaussian that factorises over thoughts",
    ),
    "FullCovariance": Case(guide=FullCovariance, inference=EXACT),
    "JointCovariance": Case(guide=JointCovariance, inference=EXACT),
    "LowRank": Case(guide=LowRank, inference=NOISY),
    "FlowGuide": Case(guide=FlowGuide, inference=NOISY),
    "Laplace": Case(guide=Laplace, inference=WITHOUT_DRAWS),
}


def check_inference(seed: int = 0) -> dict[str, Any]:
    """Truth, estimate, error and a verdict for every guide on both models; evidence and bounds in nats per sequence.

    On the linear-Gaussian model q is compared with the best answer that its family has, and with the posterior.
    """
    with one_at_a_time, double_precision(), seeded(seed):
        linear, two_modes = LinearGaussianModel(SHAPE), TwoModesModel(SHAPE)
        batch = linear.sample_batch(SEQUENCES)
        cases = _available()
        return {
            "linear_gaussian": {name: _on_linear_gaussian(linear, batch, case) for name, case in cases.items()},
            "two_modes": {name: _on_two_modes(two_modes, batch, case) for name, case in cases.items()},
        }


def _available() -> dict[str, Case]:
    """The cases whose guides are installed; a warning says which extra the others need."""
    found, model = {}, LinearGaussianModel(SHAPE)
    for name, case in CASES.items():
        try:
            case.guide(model)
            found[name] = case
        except UsageError as missing:
            warnings.warn(f"{missing} It is left out.", stacklevel=3)
    return found


@contextmanager
def double_precision() -> Iterator[None]:
    """float64 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_linear_gaussian(model: LinearGaussianModel, batch: Batch, case: Case) -> dict[str, Any]:
    guide = case.guide(model)
    state, _ = infer_local(model, guide, batch, case.inference)
    truth = case.truth(model, batch)
    found = fitted_gaussian(guide, state)
    errors = {"best": _errors(found, truth), "posterior": _errors(found, model.posterior(batch))}
    is_close = {name: all(error[x] < CLOSE[x] for x in CLOSE) for name, error in errors.items()}
    verdict = "finds the posterior"
    if not is_close["posterior"]:
        wrong = _wrong(errors["posterior"])
        verdict = f"finds {case.best}, which is not the posterior: {wrong}" if is_close["best"] else f"misses: {wrong}"
    return {
        "compared_with": case.best,
        "errors": errors,
        "verdict": verdict,
        **_bounds(model, guide, batch, state),
    }


def _wrong(error: dict[str, float]) -> str:
    """What is not close, in words."""
    words = {
        "mean": f"means are off by up to {error['mean']:.2f} prior sd",
        "variance": f"variances are wrong by up to {error['variance']:.0%}",
        "covariance": f"covariances are wrong by up to {error['covariance']:.0%} of the largest variance",
    }
    return ", ".join(words[x] for x in CLOSE if not error[x] < CLOSE[x])


def _errors(found: Gaussian, truth: Gaussian) -> dict[str, float]:
    """The largest errors of a mean (absolute; the prior's sd is 1), a variance and a covariance (relative)."""
    variance_BN, true_BN = (x.covariance_BNN.diagonal(dim1=-2, dim2=-1) for x in (found, truth))
    spread = truth.covariance_BNN.abs().amax((-2, -1), keepdim=True)
    return {
        "mean": (found.mean_BN - truth.mean_BN).abs().max().item(),
        "variance": ((variance_BN - true_BN).abs() / true_BN).max().item(),
        "covariance": ((found.covariance_BNN - truth.covariance_BNN).abs() / spread).max().item(),
    }


def _on_two_modes(model: TwoModesModel, batch: Batch, case: Case) -> dict[str, Any]:
    guide = case.guide(model)
    inference = LocalInference(steps=600, rate=0.05, particles=32, init=Init(jitter=0.3))  # off the saddle at 0
    state, _ = infer_local(model, guide, batch, inference)
    found = _bounds(model, guide, batch, state)
    short = -found["bounds"]["bound"]["above_evidence"]
    verdict = "reaches the evidence" if short < 0.1 else f"stays {short:.2f} nats below the evidence: one mode is log 2"
    return {"verdict": verdict, **found}


def fitted_gaussian(guide: Any, state: LocalState, draws: int = 20_000) -> Gaussian:
    """Mean and covariance of q's one site ``z``: in closed form if q is a Gaussian, else from ``draws`` draws."""
    q = guide.posterior("z", state.parameters)
    base = q.base_dist
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Normal) and not isinstance(q, TransformedDistribution):
        return Gaussian(base.mean.flatten(1), torch.diag_embed(base.variance.flatten(1)))
    if isinstance(base, MultivariateNormal | LowRankMultivariateNormal):
        blocks_BnDD = base.covariance_matrix.reshape(len(base.mean), -1, *base.covariance_matrix.shape[-2:])
        return Gaussian(base.mean.flatten(1), torch.stack([torch.block_diag(*blocks) for blocks in blocks_BnDD]))
    with torch.no_grad():
        z_BSN = q.sample((draws,)).flatten(2).transpose(0, 1)
    away_BSN = z_BSN - z_BSN.mean(1, keepdim=True)
    return Gaussian(z_BSN.mean(1), away_BSN.mT @ away_BSN / draws)


def _bounds(model: Any, guide: Guide, batch: Batch, state: LocalState) -> dict[str, Any]:
    evidence = model.log_evidence(batch).mean().item()
    with torch.no_grad():
        k_B = pareto_k(log_weights(model, guide, batch, state.parameters, SAMPLES))
    problem = Problem(model=model, guide=guide, batch=batch, inference=COARSE, samples=SAMPLES, state=state)
    return {
        "log_evidence": evidence,
        "bounds": {name: _figure(name, problem, REPEATS, evidence) for name in BOUNDS},
        "reused_noise": _figure("reused_noise", problem, 1, evidence),
        "pareto_k": k_B.tolist(),
        "trusted_sequences": int((k_B < TRUSTED).sum()),
    }


def _figure(name: str, problem: Problem, repeats: int, evidence: float) -> dict[str, Any]:
    """An estimator's log-probability per sequence, with the standard error of its own draws over repeats."""
    with torch.no_grad():
        values_R = torch.stack([-ESTIMATORS[name].estimate(problem).nats_B.mean() for _ in range(repeats)])
    estimate = values_R.mean().item()
    return {
        "estimate": estimate,
        "stderr": standard_error(values_R).item() if repeats > 1 else 0.0,  # one repeat: the estimate has no noise
        "above_evidence": estimate - evidence,
        "is_bound": ESTIMATORS[name].is_bound,
    }
