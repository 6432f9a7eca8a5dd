"""From texts to a `Posterior`: fit q to each sequence (or run chains), draw from it, and store draws and figures.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ltm_pyro.analysis.draws import LogDensities, Sites, draw_from_guide
from ltm_pyro.analysis.moments import Moments, exact_moments, marginal_kl, sample_moments
from ltm_pyro.analysis.posterior import LOCAL, SAMPLES, SEQUENCES, TEXT, THOUGHTS, Posterior, totals
from ltm_pyro.analysis.predictive import statistics_of
from ltm_pyro.analysis.reference import KERNELS, ChainOptions, run_chains
from ltm_pyro.analysis.storage import stamp
from ltm_pyro.analysis.texts import Longer, Piece, Text, as_texts, label_values, pieces
from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.data.encode import batch_of_rows, batches_of_like_length
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.ais import Annealing
from ltm_pyro.inference.covariates import prior_arguments, with_labels
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.estimators import Problem, ais
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import pareto_k
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import write
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.parallel import check_workers, track_map
from ltm_pyro.utils.rng import seeded

BATCH = 16  # sequences fitted together
CHAINS = 16  # of annealed importance sampling, as `ltm evaluate` has by default
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
        annealing: if given, 16 chains of annealed importance sampling check each sequence's evidence.
    """

    method: Method = "guide"
    samples: int = 100
    chains: ChainOptions = field(default_factory=ChainOptions)
    replicas: int = 0
    annealing: Annealing | None = None

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
    workers: int = 1,
) -> Posterior:
    """The posterior of the thoughts of each text, one sequence per text (or several if ``longer`` is ``split``).

    Args:
        options: method and number of draws.
        steps: T_fast; by default the recipe's ``evaluation.steps``.
        guide: used in place of the run's own guide.
        longer: what to do with texts longer than the model (see `pieces`).
        seed: random seed, also of the one draw of each global latent variable.
        workers: processes on a CPU that share the texts, forked from this one; no figure depends on it.
    """
    check_workers(workers, run.device)
    options = options or DrawOptions()
    run, found = prepare(run, texts, steps, guide, longer)
    length = max(len(piece.tokens) for piece in found)
    with fix_global_draws(run.model, seed):
        groups = draw_sequences(run, found, length, options, seed, track_map("inferring", workers))
    for name, data in text_groups(run, found).items():
        groups[name] = groups[name].assign(data)
    return assemble(groups, settings_of_run(run, options, seed))


def prepare(
    run: Run, texts: Sequence[str | Text], steps: int | None, guide: Guide | None, longer: Longer
) -> tuple[Run, list[Piece]]:
    """The run with the guide and the fast steps that are asked for, and the sequences of the texts."""
    if 0 in run.model.decoder.thought_shape:
        raise UsageError("The run has no thoughts (K = 0), so there is no posterior: give a run with thoughts.")
    run = run._replace(guide=guide or run.guide)
    run = run if steps is None else run._replace(inference=replace(run.inference, steps=steps))
    return run, pieces(run, as_texts(texts), longer)


def draw_sequences(
    run: Run,
    found: Sequence[Piece],
    length: int,
    options: DrawOptions,
    seed: int,
    mapper: Callable[..., Iterable[Groups]] = map,
) -> Groups:
    """All groups of the sequences in their order, with axes of ``length`` tokens; texts and labels are not among them.

    Sequences of like length are fitted together, so that little is spent on padding; a Markov chain takes one.

    Args:
        mapper: computes a function of every batch, as `map` does; `track_map` does so in several processes.
    """
    lengths = [len(piece.tokens) for piece in found]
    alone = [[index] for index in range(len(found))]
    chunks = batches_of_like_length(lengths, BATCH, run.length) if options.method == "guide" else alone
    work = partial(_chunk_groups, run, length, options, seed)
    groups = join([*mapper(work, ([found[n] for n in chunk] for chunk in chunks))])
    order = np.argsort(np.concatenate(chunks))
    return {name: x.isel(sequence=order) if "sequence" in x.dims else x for name, x in groups.items()}


def _chunk_groups(run: Run, length: int, options: DrawOptions, seed: int, chunk: Sequence[Piece]) -> Groups:
    """All groups of one batch of sequences."""
    batch = batch_of_rows([x.tokens for x in chunk], run.start_token, run.length, run.device)
    batch = with_labels(batch, [piece.text.labels for piece in chunk])
    groups = _batch_groups(run.model, run.guide, batch, run.inference, options, seed)
    missing = {"token": (0, length - batch.targets_BT.shape[1])}
    padding = {"tokens": MISSING, "log_likelihood": np.nan}
    groups[TEXT] = groups[TEXT].map(lambda x: x.pad(missing, constant_values=padding[str(x.name)]))
    if options.replicas:
        z_RBLKD = torch.from_numpy(groups["posterior"]["z"].values[0, : options.replicas]).to(run.device)
        keys = RowKeys.of_batch(batch, seed)
        tokens = [write_tokens(run, z_BLKD, run.length, keys.fold_in(r)) for r, z_BLKD in enumerate(z_RBLKD)]
        written = [
            [_storable(run.tokenizer.decode([x for x in row if x >= 0])) for row in rows.tolist()] for rows in tokens
        ]
        groups[TEXT] = groups[TEXT].assign(
            replica_tokens=(("replica", "sequence", "replica_token"), _numpy(torch.stack(tokens))),
            replica_text=(("replica", "sequence"), np.array(written, dtype=object)),
        )
    return groups


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
    parts = [batch] if options.method == "guide" else alone
    with fix_global_draws(model, seed):
        groups = join([_batch_groups(model, guide, part, inference, options, seed) for part in parts])
    return assemble(groups, settings(options, guide, inference, seed))


def _batch_groups(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, options: DrawOptions, seed: int
) -> Groups:
    """All groups of a `Posterior` that do not need text; each sequence has a random stream of its own."""
    keys = RowKeys.of_batch(batch, seed)
    with torch.no_grad():
        batch = batch if batch.stem_BTD is not None else model.prepare(batch)
    if options.method == "guide":
        groups = _guide_groups(model, guide, batch, inference, options, keys)
    else:
        with seeded(int(keys.key_B) % 2**63):
            groups = _chain_groups(model, batch, options, seed)
    with torch.no_grad(), seeded(seed):
        prior_SLKD = model.sample_prior(options.samples)
    tokens_BT = batch.targets_BT.masked_fill(~batch.mask_BT, MISSING)
    groups[TEXT] = groups[TEXT].assign(tokens=(("sequence", "token"), _numpy(tokens_BT)))
    names = np.array([f"sequence:{index}" for index in batch.ids_B.tolist()], dtype=object)
    groups["constant_data"] = xr.Dataset({"document": ("sequence", names)})
    groups["prior"] = xr.Dataset({"z": ((*SAMPLES, *THOUGHTS), _numpy(prior_SLKD)[None])})
    return groups


def _guide_groups(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, options: DrawOptions, keys: RowKeys
) -> Groups:
    """Fits q; draws from it, with k-hat, moments and, if log p(z) is known, the bounds and the KL in nats."""
    state, info = infer_local(model, guide, batch, inference, keys=keys)
    q = draw_from_guide(model, guide, batch, state.parameters, options.samples, keys.fold_in("posterior"))
    sites = {name: x[None] for name, x in q.sites.items()}
    groups = _draw_groups(sites, LogDensities._make(x[None] for x in q.densities), batch)
    stats = groups[SEQUENCES]
    by_step = {"elbo_by_step": info.elbo_NB, "kl_by_step": info.kl_NB} if len(info.kl_NB) else {}
    for name, x_NB in by_step.items():
        stats[name] = (("step", "sequence"), _numpy(x_NB))
    if guide.has_density:
        stats["log_q"] = (("chain", "draw", "sequence"), _numpy(q.log_q_SB)[None])
        log_weights_SB = q.log_weights_SB
        figures = {"pareto_k": pareto_k(log_weights_SB)}
        if missing_bound(model, guide) is None:  # an unnormalised prior's constant does not change k-hat
            figures["elbo"] = log_weights_SB.mean(0)
            figures["iwae"] = log_weights_SB.logsumexp(0) - np.log(options.samples)
            figures["kl"] = -q.log_ratio_SB.mean(0)
            if options.annealing:
                problem = Problem(
                    model=model,
                    guide=guide,
                    batch=batch,
                    inference=inference,
                    samples=CHAINS,
                    state=state,
                    annealing=options.annealing,
                )
                figures["ais"] = -ais(problem).nats_B
        for name, x_B in figures.items():
            stats[name] = ("sequence", _numpy(x_B))
    z_SBLKD = q.densities.z_SBLKD
    site = _thought_site(z_SBLKD, q.sites)
    exact = exact_moments(guide.posterior(site, state.parameters)) if site and hasattr(guide, "posterior") else None
    moments, prior = exact or sample_moments(z_SBLKD), _prior_moments(model, batch, z_SBLKD, q.sites, keys.seed)
    _add_moments(stats, moments, prior if guide.has_density else None)
    groups[LOCAL] = xr.Dataset({name: (_axes(name, x, "sequence"), _numpy(x)) for name, x in state.parameters.items()})
    return groups


def _chain_groups(model: Model, batch: Batch, options: DrawOptions, seed: int) -> Groups:
    """Runs Markov chains for a batch of one sequence; their draws, moments, and how they went (`ChainDraws`)."""
    chains = run_chains(model, batch, options.method, options.samples, options.chains)
    groups = _draw_groups(chains.sites, chains.densities, batch)
    stats = groups[SEQUENCES]
    z_SBLKD = chains.densities.z_SBLKD.flatten(0, 1)
    prior = _prior_moments(model, batch, z_SBLKD, {name: x.flatten(0, 1) for name, x in chains.sites.items()}, seed)
    _add_moments(stats, sample_moments(z_SBLKD, torch.from_numpy(chains.diagnostics["ess"])), prior)
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
        TEXT: xr.Dataset({"log_likelihood": ((*lead, "token"), _numpy(without_padding))}),
        SEQUENCES: xr.Dataset(
            {
                "lp": (lead, _numpy(log_prior + by_sequence)),
                "log_prior": (lead, _numpy(log_prior)),
                "log_likelihood": (lead, _numpy(by_sequence)),
            }
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


def _prior_moments(model: Model, batch: Batch, z_SBLKD: Tensor, sites: Sites, seed: int) -> Moments:
    """The moments of p(z): exact if z is the only site and its moments are known, else from 1,000 draws."""
    site = _thought_site(z_SBLKD, sites) if len(sites) == 1 else None
    if site and (exact := exact_moments(prior_sites(model, *prior_arguments(model, batch))[site])):
        return exact
    with torch.no_grad(), seeded(seed):  # the same for every batch
        return sample_moments(model.sample_prior(1000))


def text_groups(run: Run, found: Sequence[Piece]) -> Groups:
    """The text of each sequence as the decoder sees it, its document and its labels."""
    texts = [run.tokenizer.decode([x for x in piece.tokens if x != run.start_token]) for piece in found]
    names = sorted({name for piece in found for name in piece.text.labels})
    labels = {name: label_values([piece.text.labels for piece in found], name) for name in names}
    known = {"document": np.array([piece.text.document for piece in found], dtype=object)} | labels
    constant = xr.Dataset({name: ("sequence", x) for name, x in known.items()})
    for name, x in labels.items():
        if x.dtype.kind == "f" and all(isinstance(piece.text.labels.get(name, 0), int | None) for piece in found):
            constant[name].attrs["whole"] = 1
    return {TEXT: xr.Dataset({"text": ("sequence", np.array(texts, dtype=object))}), "constant_data": constant}


def _storable(text: str) -> str:
    """A text without NUL, which netCDF cannot store and a model may write."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}")


def settings_of_run(run: Run, options: DrawOptions, seed: int) -> dict[str, str]:
    """`settings`, with where the run was loaded from and the digest of its weights."""
    return settings(options, run.guide, run.inference, seed) | {"run": run.source, "weights": run.digest}


def settings(options: DrawOptions, guide: Guide, inference: LocalInference, seed: int) -> dict[str, str]:
    """What the draws were made with, as strings for attributes of the file: the guide's, or the kernel's."""
    if options.method == "guide":
        how: dict[str, Any] = {"guide": type(guide).__name__, "steps": inference.steps}
    else:
        of = options.chains
        how = {"kernel": KERNELS[options.method].name, "chains": of.chains, "warmup": of.warmup, "thin": of.thin}
    found = {"method": options.method, "samples": options.samples, "seed": seed} | how
    return {name: str(x) for name, x in found.items()}


def join(parts: Sequence[Groups]) -> Groups:
    """The groups of several batches as one, with ArviZ's ``observed_data``; the prior's draws are the first batch's."""
    groups = {}
    for name, data in parts[0].items():
        if name != "prior":
            data = xr.concat([part[name] for part in parts], "sequence", data_vars="all", join="override")
        groups[name] = data
    groups["observed_data"] = statistics_of(groups[TEXT]["tokens"])
    if "replica_tokens" in groups[TEXT]:
        of_replicas = statistics_of(groups[TEXT]["replica_tokens"])
        groups["posterior_predictive"] = of_replicas.rename(replica="draw").expand_dims("chain")
    return groups


def assemble(groups: Groups, attrs: dict[str, Any]) -> Posterior:
    """One `Posterior` of all groups, with numbered axes and with what made the draws as attributes."""
    tree = xr.DataTree.from_dict(number_axes(groups | {"sample_stats": totals(groups[SEQUENCES])}))
    made = stamp("posterior")
    library = {"inference_library": "ltm_pyro", "inference_library_version": made["ltm_pyro"]}
    for name in ("posterior", "sample_stats"):
        tree[name].attrs = library | attrs
    tree.attrs = made | attrs
    return Posterior(tree)


def number_axes(groups: Groups) -> Groups:
    """The groups with the numbers of sequences, draws, layers and so on as coordinates."""
    first = dict.fromkeys(("sequence", *SAMPLES, "dim", "token", "step"), 0) | {"layer": 1, "thought": 1}
    return {
        name: data.assign_coords(
            {axis: np.arange(n, n + data.sizes[axis]) for axis, n in first.items() if axis in data.sizes}
        )
        for name, data in groups.items()
    }


def write_tokens(run: Run, z_BLKD: Float[Tensor, "B L K D"], length: int, keys: RowKeys) -> Int[Tensor, "B T"]:
    """The tokens of a text generated from each z, at most ``length`` up to the end of text; `MISSING` after it."""
    rows = write(run, [[]] * len(z_BLKD), z_BLKD, keys, Sampling(max_new_tokens=length))
    return torch.tensor([[*row, run.start_token, *[MISSING] * length][:length] for row in rows])


def _axes(name: str, x: Tensor, *lead: str) -> tuple[str, ...]:
    return (*lead, *(f"{name}_dim_{index}" for index in range(x.dim() - len(lead))))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
