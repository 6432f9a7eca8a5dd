"""Sensitivity to prior and likelihood: what each document's posterior would be if one of them counted more or less.

Shapes: S draws, N sequences.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from pyro.poutine.messenger import Messenger

from ltm_pyro.analysis.arviz import psis
from ltm_pyro.analysis.draws import draw_from_guide
from ltm_pyro.analysis.information import observed_batch
from ltm_pyro.analysis.moments import exact_moments, sample_moments
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.contracts import TOKENS, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.rng import seeded

Component = Literal["prior", "likelihood"]
COMPONENTS: tuple[Component, ...] = ("prior", "likelihood")
ALPHAS = (0.5, 2.0)
DRAWS = 200  # of a q whose moments have no closed form, in a refit


def power_scaling(posterior: Posterior, run: Run | None = None, alphas: tuple[float, ...] = ALPHAS) -> xr.Dataset:
    r"""Every sequence's posterior under a prior or a likelihood that is raised to a power (arXiv 2107.14054).

    .. math:: p_\alpha(z \mid x) \propto p(z)^\alpha \, p(x \mid z) \text{ or } p(z) \, p(x \mid z)^\alpha, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)} \, p(z_s)^{\alpha - 1}

    Draws of q are reweighted, with Pareto-smoothed weights that also correct q. Where k-hat of the weights is above 0.7
    they say nothing, and q is fitted again, if the run is given: under the power, and as the base without it.

    Returns:
        By component, alpha and sequence: ``mean``, ``sd`` and ``shift`` = (mean − base) / base sd of every coordinate;
        ``refit``, whether q was fitted again; NaN where weights say nothing and there is no run. A shift beyond ±1 says
        that how much the component counts matters more than what is uncertain.
    """
    if not alphas or not all(0 < alpha < math.inf for alpha in alphas):
        raise UsageError(f"A power is a finite number above 0, got {alphas}: give for example (0.5, 2).")
    weights_SN = (
        posterior.log_weights().stack(sample=SAMPLES, create_index=False).transpose("sample", "sequence").values
    )
    z_SND = posterior.draws.transpose("draw", "sequence", "coordinate").values
    parts = {name: posterior.stats[f"log_{name}"].values.reshape(-1, posterior.size) for name in COMPONENTS}
    base, base_k_N = _weighted(weights_SN, z_SND)
    shape = (len(COMPONENTS), len(alphas), *z_SND.shape[1:])
    mean, sd, shift = (np.full(shape, np.nan) for _ in range(3))
    refit = np.zeros(shape[:3], bool)
    as_it_is: tuple[np.ndarray, np.ndarray] | None = None
    for place in np.ndindex(*shape[:2]):
        name, alpha = COMPONENTS[place[0]], alphas[place[1]]
        found, k_N = _weighted(weights_SN + (alpha - 1) * parts[name], z_SND)
        bad_N = ~((k_N <= TRUSTED) & (base_k_N <= TRUSTED))
        mean[place], sd[place] = (np.where(bad_N[:, None], np.nan, x) for x in found)
        shift[place] = (mean[place] - base[0]) / base[1]
        if run is not None and bad_N.any():
            as_it_is = as_it_is or _refitted(run, posterior, name, 1.0)  # fitted alike: a power of 1 is no shift
            again = _refitted(run, posterior.select(np.flatnonzero(bad_N)), name, alpha)
            mean[place][bad_N], sd[place][bad_N] = again
            shift[place][bad_N] = (again[0] - as_it_is[0][bad_N]) / as_it_is[1][bad_N]
        refit[place] = bad_N
    axes, of = ("component", "alpha", "sequence"), posterior.stats["mean"]
    sizes = [of.sizes[axis] for axis in THOUGHTS]
    data = {name: ((*axes, *THOUGHTS), x.reshape(*x.shape[:3], *sizes)) for name, x in (("mean", mean), ("sd", sd))}
    data["shift"] = ((*axes, *THOUGHTS), shift.reshape(*shape[:3], *sizes))
    places: dict[Any, Any] = {name: of.coords[name] for name in THOUGHTS} | {
        "component": [*COMPONENTS],
        "alpha": [*alphas],
    }
    return xr.Dataset(data | {"refit": (axes, refit)}, places)


def _weighted(log_weights_SN: np.ndarray, z_SND: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Mean and standard deviation of reweighted draws, and k-hat of the weights."""
    log_NS, k_N = psis(np.ascontiguousarray(log_weights_SN.T, float))
    w_SN1 = np.exp(log_NS.T)[..., None]
    mean_ND = (w_SN1 * z_SND).sum(0)
    return (mean_ND, (w_SN1 * (z_SND - mean_ND) ** 2).sum(0) ** 0.5), k_N


@seeded(0)
def _refitted(run: Run, some: Posterior, component: Component, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of q, fitted with a component of the model raised to a power."""
    batch = observed_batch(some, run.start_token).to(run.device)
    seed = int(some.attrs.get("seed", 0))
    keys = RowKeys.of_batch(batch, seed)
    scaled: Any = PowerScaled(run.model, **{component: alpha})
    steps = int(some.attrs.get("steps", run.inference.steps))
    inference = replace(run.inference, steps=steps, kl="path")  # the closed form of a KL knows no power
    with fix_global_draws(run.model, seed):
        state, _ = infer_local(scaled, run.guide, batch, inference, keys=keys)
        (site, *others) = prior_sites(run.model, 1)
        exact = None if others or not hasattr(run.guide, "posterior") else run.guide.posterior(site, state.parameters)
        moments = exact_moments(exact) if exact is not None else None
        if moments is None:
            with torch.no_grad():
                batch = run.model.prepare(batch)
            drawn = draw_from_guide(run.model, run.guide, batch, state.parameters, DRAWS, keys.fold_in("sensitivity"))
            moments = sample_moments(drawn.densities.z_SBLKD)
    return moments.mean.flatten(1).cpu().numpy(), moments.variance.sqrt().flatten(1).cpu().numpy()


class PowerScaled:
    """A model whose prior and likelihood are raised to powers in the ELBO; all else is the model's own."""

    def __init__(self, model: Model, prior: float = 1.0, likelihood: float = 1.0) -> None:
        self.model, self.powers = model, _Powers(prior, likelihood)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The model's program, with powers."""
        with self.powers:
            return self.model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Powers(Messenger):
    """A Pyro handler that scales the log-densities of latent and of observed sites."""

    def __init__(self, prior: float, likelihood: float) -> None:
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = msg["scale"] * (self.likelihood if msg["name"] == TOKENS else self.prior)
