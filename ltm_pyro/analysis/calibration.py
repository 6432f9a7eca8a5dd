"""Simulation-based calibration: is q calibrated on average over texts that the model generates?

Shapes: N simulations, S draws, C coordinates of z, R = S + 1 ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from pyro import poutine
from scipy import stats

from ltm_pyro.analysis.draw_posterior import MISSING, write_tokens
from ltm_pyro.analysis.draws import Sites, draw_from_guide, evenly_spaced, log_densities
from ltm_pyro.analysis.storage import read_tree, stamp, write_tree
from ltm_pyro.contracts import Batch, Guide, Model, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.parallel import check_workers, track_map
from ltm_pyro.utils.rng import seeded

BATCH = 16  # simulations per fit
BINS = 10
PERMUTATIONS = 999
LOG_LIKELIHOOD = "log p(x | z)"
SIMULATIONS = "ltm_pyro/simulations"  # the group of the values, which ArviZ does not know


class Simulation(NamedTuple):
    """Draws of the prior's latent sites, each (B, *event), and the texts generated from them."""

    sites: Sites
    batch: Batch


Simulate = Callable[[int], Simulation]  # batch size -> simulation


@dataclass(frozen=True)
class Calibration:
    r"""The truth z* and S draws from q for each of N simulations (Talts et al. 2018, arXiv 1804.06788).

    .. math:: z^* \sim p(z), \quad x \sim p(x \mid z^*), \quad z_1 \dots z_S \sim q(z \mid x)

    If q(z | x) = p(z | x), the truth and the draws are exchangeable, and the rank of each coordinate of z* among the
    draws is uniform. ``values`` has shape (N, S + 1, C), the truth first. The last coordinate is log p(x | z), which
    detects errors that no single coordinate shows (Modrák et al. 2023, arXiv 2211.02383).
    """

    values: Float[np.ndarray, "N R C"]
    names: tuple[str, ...]

    @cached_property
    def all_ranks(self) -> Int[np.ndarray, "N R C"]:
        """For each of the S + 1 values, how many of the others are smaller; ties are broken at random."""
        ties = np.random.default_rng(0).random(self.values.shape)
        return np.lexsort((ties, self.values), axis=1).argsort(1)

    @property
    def ranks(self) -> Int[np.ndarray, "N C"]:
        """The truth's ranks, from 0 to S."""
        return self.all_ranks[:, 0]

    @property
    def counts(self) -> Int[np.ndarray, "bins C"]:
        """The rank histogram of every coordinate."""
        return _histogram(_bins(self.ranks, self.values.shape[1]))

    def p_value(self, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
        r"""An exact p-value of the hypothesis "q is the posterior", for all coordinates and any dependence among them.

        Two distances: the chi-squared distance of the rank histograms from uniform ones, summed over the coordinates of
        z, and that of log p(x | z) alone, which would be negligible in a sum over many coordinates. Under the
        hypothesis each of the S + 1 values is equally likely to be the truth. So the null distribution of both
        distances is found by choosing one value at random in every simulation. Each distance is standardised by that
        distribution; the statistic is the larger one.
        """
        binned, random = _bins(self.all_ranks, self.values.shape[1]), np.random.default_rng(seed)
        simulations, candidates, _ = binned.shape
        rows, truth = np.arange(simulations), np.zeros((1, simulations), int)
        chosen = np.concatenate([truth, random.integers(candidates, size=(permutations, simulations))])
        distances = np.stack([_distances(_histogram(binned[rows, pick])) for pick in chosen])
        unusual = ((distances - distances.mean(0)) / np.maximum(distances.std(0), 1e-12)).max(1)
        return float((unusual >= unusual[0]).mean())

    def p_values(self) -> dict[str, float]:
        """A chi-squared p-value for each coordinate alone, by name."""
        found = stats.chisquare(self.counts, axis=0).pvalue
        return dict(zip(self.names, np.atleast_1d(found).tolist(), strict=True))

    def coverage(self, levels: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The share of truths inside central intervals of these probabilities, over all coordinates of z."""
        return _inside(self.ranks[:, :-1], self.values.shape[1], levels)

    def attainable(self, levels: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The coverage that these intervals have if q is the posterior, given that there are only S + 1 ranks."""
        candidates = self.values.shape[1]
        return _inside(np.arange(candidates), candidates, levels)

    def coverage_by_coordinate(self, levels: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n C"]:
        """The share of truths inside central intervals of these probabilities, for each coordinate alone."""
        within_NC = 2 * np.abs((self.ranks + 0.5) / self.values.shape[1] - 0.5)
        return (within_NC[:, None] <= levels[:, None]).mean(0)

    def tarp(self) -> Float[np.ndarray, " N"]:
        r"""Tests of accuracy with random points, for all coordinates of z together (Lemos et al. 2023).

        .. math:: f_i = \tfrac1S \sum_s 1\{ d(z_{is}, r_i) < d(z^*_i, r_i) \}

        r_i is a draw from the prior, the truth of another simulation; the distance d is Euclidean, in prior standard
        deviations. Uniform if q is the posterior; a q that is the prior passes as well. Source: arXiv 2302.03026.
        """
        z_NRC = self.values[..., :-1] / self.values[:, 0, :-1].std(0)
        distance_NR = np.linalg.norm(z_NRC - np.roll(z_NRC[:, 0], 1, axis=0)[:, None], axis=-1)
        closer_N = (distance_NR[:, 1:] < distance_NR[:, :1]).sum(1)
        return (closer_N + 0.5) / distance_NR.shape[1]

    def contraction(self) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N C"]]:
        r"""How much each q knows and how far it is off: contraction and z-score (Schad et al. 2021, arXiv 1904.12765).

        .. math:: 1 - \frac{\mathrm{Var}_q(z)}{\mathrm{Var}_p(z)}, \qquad \frac{E_q[z] - z^*}{\mathrm{sd}_q(z)}

        Of the coordinates of z. A z-score beyond 3 is rare where q is right; contraction 0 is a q that is the prior.
        """
        truth_NC, draws_NSC = self.values[:, 0, :-1], self.values[:, 1:, :-1]
        sd_NC = draws_NSC.std(1, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # a point has no scale
            return 1 - sd_NC**2 / truth_NC.var(0, ddof=1), (draws_NSC.mean(1) - truth_NC) / sd_NC

    def save(self, path: str | Path) -> None:
        """Writes netCDF or zarr: the values, and in ``prior_sbc`` the ranks as ArviZ's `plot_ecdf_pit` takes them."""
        names, candidates = {"coordinate": list(self.names)}, self.values.shape[1]
        pit = xr.Dataset({"pit": (("chain", "draw", "coordinate"), (self.ranks[None] + 0.5) / candidates)}, names)
        values = xr.Dataset({"values": (("simulation", "candidate", "coordinate"), self.values)}, names)
        tree = xr.DataTree.from_dict({"prior_sbc": pit, SIMULATIONS: values})
        tree.attrs = stamp("calibration")
        write_tree(tree, path)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Reads a file that `save` has written."""
        found = read_tree(path, "calibration")[SIMULATIONS].to_dataset()
        return cls(found["values"].values, tuple(map(str, found["coordinate"].values)))


def _bins(ranks: Int[np.ndarray, "*any"], candidates: int) -> Int[np.ndarray, "*any"]:
    return ranks * BINS // candidates


def _histogram(binned_NC: Int[np.ndarray, "N C"]) -> Int[np.ndarray, "bins C"]:
    return np.stack([(binned_NC == index).sum(0) for index in range(BINS)])


def _distances(counts: Int[np.ndarray, "bins C"]) -> Float[np.ndarray, " 2"]:
    """Chi-squared distances from uniform: summed over the coordinates of z, and of log p(x | z)."""
    expected = counts.sum(0) / BINS
    distance_C = ((counts - expected) ** 2 / expected).sum(0)
    return np.array([distance_C[:-1].sum(), distance_C[-1]])


def _inside(
    ranks: Int[np.ndarray, "*any"], candidates: int, levels: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    position = (ranks + 0.5) / candidates
    return np.array([(np.abs(position - 0.5) <= level / 2).mean() for level in levels])


def envelope(simulations: int, points: Float[np.ndarray, " n"], level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits that contain the ECDF of uniform ranks at all points with probability ``level``.

    Found by simulation (Säilynoja, Bürkner & Vehtari 2022, arXiv 2103.10522).
    """
    random = np.random.default_rng(0)
    counts = (random.random((1000, simulations, 1)) <= points).sum(1)
    binomial = stats.binom(simulations, points)
    worst = np.minimum(2 * binomial.cdf(counts), 2 * binomial.sf(counts - 1)).min(1)
    tail = np.quantile(worst, 1 - level) / 2
    return binomial.ppf(tail) / simulations, binomial.ppf(1 - tail) / simulations


@seeded(0)
def calibrate(
    model: Model,
    guide: Guide,
    inference: LocalInference,
    simulate: Simulate,
    simulations: int = 100,
    samples: int = 99,
    coordinates: int = 128,
    seed: int = 0,
    workers: int = 1,
) -> Calibration:
    """Draws z from the prior and texts given z, fits q to the texts, draws from q, and ranks z among the draws.

    Args:
        simulate: makes a simulation of a given batch size.
        samples: S; S + 1 must be a multiple of the number of bins, 10.
        coordinates: the largest number of coordinates of z that are kept, evenly spaced; log p(x | z) is one more.
        seed: random seed.
        workers: processes on a CPU that share the simulations, forked from this one; no figure depends on it.
    """
    if simulations < 2 * BINS:
        raise UsageError(f"A rank histogram needs at least {2 * BINS} simulations, got {simulations}.")
    if (samples + 1) % BINS:
        raise UsageError(f"Samples + 1 must be a multiple of {BINS}, got {samples}: choose 99, for example.")
    check_workers(workers, next((x.device for x in model.parameters()), torch.device("cpu")))

    def rank_batch(index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        with torch.no_grad():
            with seeded(seed, index):
                simulation = simulate(min(BATCH, simulations - index * BATCH))
            batch, keys = model.prepare(simulation.batch), RowKeys.of_batch(simulation.batch, seed)
            state, _ = infer_local(model, guide, batch, inference, keys=keys)
            q_keys = keys.fold_in("calibration")
            drawn = draw_from_guide(model, guide, batch, state.parameters, samples, q_keys).densities
            truth = log_densities(model, batch, {name: x[None] for name, x in simulation.sites.items()})
        z_RBLKD = torch.cat([truth.z_SBLKD, drawn.z_SBLKD])
        nats_RB = torch.cat([truth.log_likelihood_SBT, drawn.log_likelihood_SBT]).sum(-1)
        shape = tuple(z_RBLKD.shape[2:])
        kept_z_RBC = z_RBLKD.flatten(2)[..., evenly_spaced(math.prod(shape), coordinates)]
        values_RBC = torch.cat([kept_z_RBC, nats_RB[..., None]], dim=-1)
        return values_RBC.transpose(0, 1).double().cpu().numpy(), shape

    batches = range(-(-simulations // BATCH))
    with fix_global_draws(model, seed):
        found = [*track_map("calibrating", workers)(rank_batch, batches)]
    shape = found[0][1]
    kept = evenly_spaced(math.prod(shape), coordinates)
    places = zip(*np.unravel_index(kept, shape), strict=True)
    names = [f"z[{layer + 1}, {thought + 1}, {dim}]" for layer, thought, dim in places]  # as in a posterior
    return Calibration(np.concatenate([values for values, _ in found]), (*names, LOG_LIKELIHOOD))


def simulate_texts(run: Run) -> Simulate:
    """A simulator for `calibrate`: texts that a run generates from draws of the prior, up to the model's length."""
    if 0 in run.model.decoder.thought_shape:
        raise UsageError("The run has no thoughts (K = 0), so there is nothing to calibrate: give a run with thoughts.")

    def simulate(size: int) -> Simulation:
        trace: Any = poutine.trace(run.model.sample_prior).get_trace(size)
        keys = RowKeys(torch.randint(2**62, (size,), device=run.device), 0)
        rows_BT = write_tokens(run, trace.nodes["_RETURN"]["value"], run.length, keys)
        lengths_B = (rows_BT != MISSING).sum(1)
        batch = make_batch(rows_BT.masked_fill(rows_BT == MISSING, run.start_token), lengths_B, run.start_token)
        sites = {name: trace.nodes[name]["value"] for name in prior_sites(run.model, 1)}
        return Simulation(sites, batch.to(run.device))

    return simulate
