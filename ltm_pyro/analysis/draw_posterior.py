"""From texts to a `Posterior`: fit q to each sequence (or run chains), draw from it, and store draws and figures.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

from ltm_pyro.analysis.draws import LogDensities, Sites, draw_from_guide
from ltm_pyro.analysis.moments import Moments, exact_moments, marginal_kl, sample_moments
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.analysis.reference import ChainOptions, run_chains
from ltm_pyro.analysis.storage import stamp
from ltm_pyro.analysis.texts import Longer, Piece, Text, as_texts, label_values, pieces
from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.data.encode import batch_of_rows, batches_of_like_length
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments, with_labels
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import pareto_k
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import write
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.rng import seeded

BATCH = 16  # sequences fitted together
MISSING = -1  # marks padding in stored tokens
Method = Literal["guide", "nuts", "langevin"]
Groups = dict[str, xr.Dataset]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How draws of a posterior are made.

    Args:
        method: ``guide`` fits q and draws from it; ``nuts`` and ``langevin`` run Markov chains, one sequence at a time.
        samples: S, draws per sequence (and per chain).
        chains: options of the Markov chains.
        replicas: texts per sequence that are generated from draws of z, for posterior predictive checks.
    """

    method: Method = "guide"
    samples: int = 100
    chains: ChainOptions = field(default_factory=ChainOptions)
    replicas: int = 0

    def __post_init__(self) -> None:
        if self.samples < 25:
            raise UsageError(f"Pareto k-hat and intervals need at least 25 samples, got {self.samples}: draw more.")
        if self.replicas > self.samples:
            raise UsageError(f"{self.replicas} replicas need as many samples, got {self.samples}: draw more.")


@seeded(0)
def draw_posterior(
    run: Run,
    texts: Sequence[str | Text],
    options: DrawOptions | None = None,
    steps: int | None = None,
    guide: Guide | None = None,
    longer: Longer = "refuse",
    seed: int = 0,
) -> Posterior:
    """The posterior of the thoughts of each text, one sequence per text (or several if ``longer`` is ``split``).

    Args:
        options: method and number of draws.
        steps: T_fast; by default the recipe's ``evaluation.steps``.
        guide: used in place of the run's own guide.
        longer: what to do with texts longer than the model (see `pieces`).
        seed: random seed, also of the one draw of each global latent variable.
    """
    if 0 in run.model.decoder.thought_shape:
        raise UsageError("The run has no thoughts (K = 0), so there is no posterior: give a run with thoughts.")
    run = run._replace(guide=guide or run.guide)
    run = run if steps is None else run._replace(inference=replace(run.inference, steps=steps))
    options, found = options or DrawOptions(), pieces(run, as_texts(texts), longer)
    lengths = [len(piece.tokens) for piece in found]
    batches = [[index] for index in range(len(found))]
    if options.method == "guide":
        batches = batches_of_like_length(lengths, BATCH, run.length)
    console = Console(stderr=True)
    shown = track(batches, "inferring", console=console, transient=True, disable=not console.is_terminal)
    parts, prior = [], _Prior(run.model, options.samples, seed)
    with fix_global_draws(run.model, seed):
        for indices in shown:
            rows = [found[index].tokens for index in indices]
            batch = batch_of_rows(rows, run.start_token, run.length, run.device)
            batch = with_labels(batch, [found[index].text.labels for index in indices])
            groups = _batch_groups(run.model, run.guide, batch, run.inference, options, prior)
            if options.replicas:
                z_RBLKD = torch.from_numpy(groups["posterior"]["z"].values[0, : options.replicas]).to(run.device)
                keys = RowKeys.of_batch(batch, seed)
                tokens = [write_tokens(run, z_BLKD, run.length, keys.fold_in(r)) for r, z_BLKD in enumerate(z_RBLKD)]
                axes = (*SAMPLES, "sequence", "token")
                groups["posterior_predictive"] = xr.Dataset({"tokens": (axes, _numpy(torch.stack(tokens))[None])})
            parts.append(groups)
        shared = {"prior": prior.draws}
    attrs = {"guide": type(run.guide).__name__, "steps": run.inference.steps, "seed": seed, "run": run.source}
    if options.method != "guide":
        attrs |= {"chains": options.chains.chains, "warmup": options.chains.warmup, "thin": options.chains.thin}
    order = np.argsort([index for indices in batches for index in indices])
    return _concatenate(parts, shared, options.method, attrs, order, _text_groups(run, found))


@seeded(0)
def draw_batch_posterior(
    model: Model,
    guide: Guide,
    batch: Batch,
    inference: LocalInference,
    options: DrawOptions | None = None,
    seed: int = 0,
) -> Posterior:
    """The posterior of each sequence of a batch, for any model and guide; `draw_posterior` adds texts and labels."""
    options = options or DrawOptions()
    alone = [batch.select(torch.tensor([index])) for index in range(batch.size)]
    batches = [batch] if options.method == "guide" else alone
    prior = _Prior(model, options.samples, seed)
    with fix_global_draws(model, seed):
        parts = [_batch_groups(model, guide, part, inference, options, prior) for part in batches]
        shared = {"prior": prior.draws}
    return _concatenate(parts, shared, options.method)


@dataclass
class _Prior:
    """What all batches have in common: draws of p(z), and its moments; at the same draw of the global latents."""

    model: Model
    samples: int
    seed: int

    @cached_property
    def draws(self) -> xr.Dataset:
        """S draws of z."""
        with torch.no_grad(), seeded(self.seed):
            return xr.Dataset({"z": ((*SAMPLES, *THOUGHTS), _numpy(self.model.sample_prior(self.samples))[None])})

    def moments(self, batch: Batch, z_SBLKD: Tensor, sites: Sites) -> Moments:
        """Exact if z is the only site and its moments are known, else from 1,000 draws."""
        site = _thought_site(z_SBLKD, sites) if len(sites) == 1 else None
        if site and (exact := exact_moments(prior_sites(self.model, *prior_arguments(self.model, batch))[site])):
            return exact
        return self._moments_of_draws

    @cached_property
    def _moments_of_draws(self) -> Moments:
        with torch.no_grad(), seeded(self.seed):
            return sample_moments(self.model.sample_prior(1000))


def _batch_groups(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, options: DrawOptions, prior: _Prior
) -> Groups:
    """All groups of a `Posterior` of one batch that do not need text; each sequence has a random stream of its own."""
    keys = RowKeys.of_batch(batch, prior.seed)
    with torch.no_grad():
        batch = batch if batch.stem_BTD is not None else model.prepare(batch)
    if options.method == "guide":
        groups = _guide_groups(model, guide, batch, inference, options.samples, keys, prior)
    else:
        with seeded(int(keys.key_B) % 2**63):
            groups = _chain_groups(model, batch, options, prior)
    tokens_BT = batch.targets_BT.masked_fill(~batch.mask_BT, MISSING)
    groups["observed_data"] = xr.Dataset({"tokens": (("sequence", "token"), _numpy(tokens_BT))})
    names = np.array([f"sequence:{index}" for index in batch.ids_B.tolist()], dtype=object)
    groups["constant_data"] = xr.Dataset({"document": ("sequence", names)})
    return groups


def _guide_groups(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, samples: int, keys: RowKeys, prior: _Prior
) -> Groups:
    """Fits q; draws from it, with k-hat, moments and, if log p(z) is known, the bounds and the KL in nats."""
    state, _ = infer_local(model, guide, batch, inference, keys=keys)
    q = draw_from_guide(model, guide, batch, state.parameters, samples, keys.fold_in("posterior"))
    sites = {name: x[None] for name, x in q.sites.items()}
    groups = _draw_groups(sites, LogDensities._make(x[None] for x in q.densities), batch)
    stats = groups["sample_stats"]
    if guide.has_density:
        stats["log_q"] = (("chain", "draw", "sequence"), _numpy(q.log_q_SB)[None])
        log_weights_SB = q.log_weights_SB
        figures = {"pareto_k": pareto_k(log_weights_SB)}
        if missing_bound(model, guide) is None:  # an unnormalised prior's constant does not change k-hat
            figures["elbo"] = log_weights_SB.mean(0)
            figures["iwae"] = log_weights_SB.logsumexp(0) - np.log(samples)
            figures["kl"] = -q.log_ratio_SB.mean(0)
        for name, x_B in figures.items():
            stats[name] = ("sequence", _numpy(x_B))
    z_SBLKD = q.densities.z_SBLKD
    site = _thought_site(z_SBLKD, q.sites)
    exact = exact_moments(guide.posterior(site, state.parameters)) if site and hasattr(guide, "posterior") else None
    moments = exact or sample_moments(z_SBLKD)
    _add_moments(stats, moments, prior.moments(batch, z_SBLKD, q.sites) if guide.has_density else None)
    groups["local"] = xr.Dataset(
        {name: (_axes(name, x, "sequence"), _numpy(x)) for name, x in state.parameters.items()}
    )
    return groups


def _chain_groups(model: Model, batch: Batch, options: DrawOptions, prior: _Prior) -> Groups:
    """Runs Markov chains for a batch of one sequence; their draws, moments, and how they went (`ChainDraws`)."""
    chains = run_chains(model, batch, options.method, options.samples, options.chains)
    groups = _draw_groups(chains.sites, chains.densities, batch)
    stats = groups["sample_stats"]
    z_SBLKD = chains.densities.z_SBLKD.flatten(0, 1)
    moments = sample_moments(z_SBLKD, torch.from_numpy(chains.diagnostics["ess"]))
    sites = {name: x.flatten(0, 1) for name, x in chains.sites.items()}
    _add_moments(stats, moments, prior.moments(batch, z_SBLKD, sites))
    for name, x_BLKD in chains.diagnostics.items():
        stats[name] = (("sequence", *THOUGHTS), x_BLKD)
    for name, x_CS in chains.steps.items():
        stats[name] = ((*SAMPLES, "sequence"), x_CS[..., None])
    return groups


def _draw_groups(sites: Sites, densities: LogDensities, batch: Batch) -> Groups:
    """Draws with leading axes chain and draw, and their log-densities, as datasets."""
    z, log_prior, by_token = densities
    by_sequence = by_token.sum(-1)
    others = {name: x for name, x in sites.items() if x.shape != z.shape or not torch.equal(x, z)}
    renamed = {f"{name}_site" if name == "z" else name: x for name, x in others.items()}
    lead = (*SAMPLES, "sequence")
    without_padding = by_token.masked_fill(~batch.mask_BT, torch.nan)
    return {
        "posterior": xr.Dataset(
            {"z": ((*lead, *THOUGHTS), _numpy(z))} | {n: (_axes(n, x, *lead), _numpy(x)) for n, x in renamed.items()}
        ),
        "log_likelihood": xr.Dataset(
            {"by_token": ((*lead, "token"), _numpy(without_padding)), "by_sequence": (lead, _numpy(by_sequence))}
        ),
        "sample_stats": xr.Dataset(
            {"lp": (lead, _numpy(log_prior + by_sequence)), "log_prior": (lead, _numpy(log_prior))}
        ),
    }


def _add_moments(stats: xr.Dataset, q: Moments, prior: Moments | None) -> None:
    """Adds mean and scale of z under q and, given the prior's, the KL of the coordinates' Gaussian marginals.

    The KL is summed over the coordinates of each thought.
    """
    axes = ("sequence", *THOUGHTS)
    for name, x_BLKD in {"mean": q.mean, "sd": q.variance.sqrt(), "mcse_mean": q.mcse}.items():
        stats[name] = (axes, _numpy(x_BLKD))
    if prior:
        stats["kl_by_thought"] = (axes[:-1], _numpy(marginal_kl(q, prior).sum(-1)))


def _thought_site(z_SBLKD: Tensor, sites: Sites) -> str | None:
    """The latent site whose draws are the thoughts themselves, if there is one."""
    return next((name for name, x in sites.items() if x.shape == z_SBLKD.shape and torch.equal(x, z_SBLKD)), None)


def _text_groups(run: Run, found: Sequence[Piece]) -> Groups:
    """The text of each sequence as the decoder sees it, its document and its labels."""
    texts = [run.tokenizer.decode([x for x in piece.tokens if x != run.start_token]) for piece in found]
    names = sorted({name for piece in found for name in piece.text.labels})
    labels = {name: label_values([piece.text.labels for piece in found], name) for name in names}
    known = {"document": np.array([piece.text.document for piece in found], dtype=object)} | labels
    return {
        "observed_data": xr.Dataset({"text": ("sequence", np.array(texts, dtype=object))}),
        "constant_data": xr.Dataset({name: ("sequence", x) for name, x in known.items()}),
    }


def _concatenate(
    parts: Sequence[Groups],
    shared: Groups,
    method: str,
    attrs: dict[str, Any] | None = None,
    order: Int[np.ndarray, " N"] | None = None,
    texts: Groups | None = None,
) -> Posterior:
    """One `Posterior` of the groups of several batches, with numbered axes.

    Args:
        shared: groups that are not of sequences.
        order: where each sequence is among those of the batches, if it is not where it was given.
        texts: further variables of the groups, of all sequences in the order in which they were given.
    """
    groups = {}
    for name in parts[0]:
        longest = max(part[name].sizes.get("token", 0) for part in parts)
        padded = [_pad_tokens(part[name], longest) for part in parts]
        data = xr.concat(padded, "sequence", data_vars="all", join="override")
        data = data if order is None else data.isel(sequence=order)
        groups[name] = data.assign((texts or {}).get(name, {}))
    first = dict.fromkeys(("sequence", *SAMPLES, "dim", "token"), 0) | {"layer": 1, "thought": 1}
    for name, data in (groups | shared).items():
        axes = {axis: np.arange(n, n + data.sizes[axis]) for axis, n in first.items() if axis in data.sizes}
        groups[name] = data.assign_coords(axes)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = stamp("posterior") | {"method": method} | (attrs or {})
    return Posterior(tree)


def _pad_tokens(data: xr.Dataset, longest: int) -> xr.Dataset:
    """A batch's group with as many tokens as that of the longest sequence: `MISSING`, and NaN for figures."""
    if not 0 < (tokens := data.sizes.get("token", 0)) < longest:
        return data
    return data.pad(token=(0, longest - tokens), constant_values={"tokens": MISSING, "by_token": np.nan})


def write_tokens(run: Run, z_BLKD: Float[Tensor, "B L K D"], length: int, keys: RowKeys) -> Int[Tensor, "B T"]:
    """The tokens of a text generated from each z, at most ``length`` up to the end of text; `MISSING` after it."""
    rows = write(run, [[]] * len(z_BLKD), z_BLKD, keys, Sampling(max_new_tokens=length))
    return torch.tensor([[*row, run.start_token, *[MISSING] * length][:length] for row in rows])


def _axes(name: str, x: Tensor, *lead: str) -> tuple[str, ...]:
    return (*lead, *(f"{name}_dim_{index}" for index in range(x.dim() - len(lead))))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
