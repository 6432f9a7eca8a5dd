"""From texts to a `Posterior`: fit q to each (or run a chain), draw, and write down what the draws say.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

from ltm_pyro.analysis.draws import Described, Drawn, Sites, draw
from ltm_pyro.analysis.moments import Moments, closed_form, marginal_kl, of_draws
from ltm_pyro.analysis.posterior import SAMPLES, THOUGHTS, Posterior
from ltm_pyro.analysis.reference import Chains, sample
from ltm_pyro.analysis.storage import stamp
from ltm_pyro.analysis.texts import Longer, Piece, Text, as_texts, pieces
from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.data.encode import batch_of_rows
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import pareto_k
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.text.generation import write
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.rng import seeded

BATCH = 16  # sequences fitted together
MISSING = -1  # a token that is not there
Method = Literal["guide", "nuts", "langevin"]
Groups = dict[str, xr.Dataset]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a posterior is drawn.

    Args:
        method: ``guide`` fits q and draws from it; ``nuts`` and ``langevin`` are reference chains, one sequence each.
        samples: S, draws per sequence (and chain).
        chains: how the reference chains run.
        replicas: texts written from draws of z per sequence, for predictive checks.
    """

    method: Method = "guide"
    samples: int = 100
    chains: Chains = field(default_factory=Chains)
    replicas: int = 0

    def __post_init__(self) -> None:
        if self.samples < 25:
            raise UsageError(f"Pareto k-hat and intervals need at least 25 samples, got {self.samples}: draw more.")
        if self.replicas > self.samples:
            raise UsageError(f"{self.replicas} replicas need as many samples, got {self.samples}: draw more.")


def draw_posterior(
    run: Run,
    texts: Sequence[str | Text],
    drawing: Drawing | None = None,
    steps: int | None = None,
    guide: Guide | None = None,
    longer: Longer = "refuse",
    seed: int = 0,
) -> Posterior:
    """The posterior of the thoughts of each text, one sequence per text (or per part of it).

    Args:
        drawing: method and number of draws.
        steps: T_fast; what the recipe says under ``evaluation`` when not given.
        guide: another family than the run's own.
        longer: what becomes of texts longer than the model (`pieces`).
        seed: of all noise, and of the one draw of what all sequences share.
    """
    if 0 in run.model.decoder.thought_shape:
        raise UsageError("The run has no thoughts (K = 0), so there is no posterior: give a run with thoughts.")
    run = run._replace(guide=guide or run.guide)
    run = run if steps is None else run._replace(inference=replace(run.inference, steps=steps))
    drawing, found = drawing or Drawing(), pieces(run, as_texts(texts), longer)
    length = max(len(piece.tokens) for piece in found)
    size = BATCH if drawing.method == "guide" else 1
    chunks = [found[first : first + size] for first in range(0, len(found), size)]
    groups = []
    with fix_global_draws(run.model, seed):
        for index, chunk in enumerate(_shown(chunks)):
            with seeded(seed, index):
                rows = [piece.tokens for piece in chunk]
                batch = batch_of_rows(rows, run.start_token, run.length, run.device, pad_to=length)
                groups.append(_inferred(run, chunk, batch, drawing))
    attrs = {"guide": type(run.guide).__name__, "steps": run.inference.steps, "seed": seed, "run": run.source}
    return _assemble(groups, drawing.method, attrs)


def _inferred(run: Run, chunk: Sequence[Piece], batch: Batch, drawing: Drawing) -> Groups:
    groups = _groups(run.model, run.guide, batch, run.inference, drawing)
    for name, data in _texts(run, chunk).items():
        groups[name] = groups[name].assign(data)
    if drawing.replicas:
        groups |= _replicas(run, groups["posterior"]["z"], drawing.replicas, batch.inputs_BT.shape[1])
    return groups


def _shown(chunks: list[list[Piece]]) -> Any:
    console = Console(stderr=True)
    return track(chunks, "inferring", console=console, transient=True, disable=not console.is_terminal)


def draw_batch_posterior(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, drawing: Drawing | None = None
) -> Posterior:
    """The posterior of each sequence of a batch, for any model and guide; texts and labels are `infer`'s."""
    drawing = drawing or Drawing()
    alone = [batch.select(torch.tensor([index])) for index in range(batch.size)]
    parts = [batch] if drawing.method == "guide" else alone
    with fix_global_draws(model, torch.initial_seed()):
        groups = [_groups(model, guide, part, inference, drawing) for part in parts]
    return _assemble(groups, drawing.method)


def _groups(model: Model, guide: Guide, batch: Batch, inference: LocalInference, drawing: Drawing) -> Groups:
    with torch.no_grad():
        batch = batch if batch.stem_BTD is not None else model.prepare(batch)
    if drawing.method == "guide":
        groups = _guide(model, guide, batch, inference, drawing)
    else:
        groups = _chains(model, batch, drawing)
    tokens_BT = batch.targets_BT.masked_fill(~batch.mask_BT, MISSING)
    prior, lone = _prior(model, drawing.samples), ("chain", "draw", *THOUGHTS)
    groups["observed_data"] = xr.Dataset({"tokens": (("sequence", "token"), _numpy(tokens_BT))})
    names = np.array([f"sequence:{index}" for index in batch.ids_B.tolist()], dtype=object)
    groups["constant_data"] = xr.Dataset({"document": ("sequence", names)})
    groups["prior"] = xr.Dataset({"z": (lone, _numpy(prior)[None])})
    return groups


def _assemble(groups: Sequence[Groups], method: str, attrs: dict[str, Any] | None = None) -> Posterior:
    joined = {
        name: groups[0][name]
        if name == "prior"
        else xr.concat([x[name] for x in groups], "sequence", data_vars="all", join="override")
        for name in groups[0]
    }
    joined = {name: _counted(x) for name, x in joined.items()}
    tree = xr.DataTree.from_dict(joined)
    tree.attrs = stamp("posterior") | {"method": method} | (attrs or {})
    return Posterior(tree)


def _counted(data: xr.Dataset) -> xr.Dataset:
    axes = dict.fromkeys(("sequence", *SAMPLES, "dim", "token"), 0) | {"layer": 1, "thought": 1}
    return data.assign_coords(
        {name: np.arange(first, first + data.sizes[name]) for name, first in axes.items() if name in data.sizes}
    )


def _guide(model: Model, guide: Guide, batch: Batch, inference: LocalInference, drawing: Drawing) -> Groups:
    state, _ = infer_local(model, guide, batch, inference)
    drawn = draw(model, guide, batch, state.parameters, drawing.samples)
    sites = {name: x[None] for name, x in drawn.sites.items()}
    groups = _described(sites, Described._make(x[None] for x in drawn.described), batch)
    stats = groups["sample_stats"]
    if guide.has_density:
        stats["log_q"] = (("chain", "draw", "sequence"), _numpy(drawn.log_q_SB)[None])
        for name, x_B in _weighed(drawn, bounded=missing_bound(model, guide) is None).items():
            stats[name] = ("sequence", _numpy(x_B))
    z_SBLKD, own = drawn.described.z_SBLKD, _site(drawn.described.z_SBLKD, drawn.sites)
    known = closed_form(guide.posterior(own, state.parameters)) if own and hasattr(guide, "posterior") else None
    q, p = known or of_draws(z_SBLKD), _prior_moments(model, z_SBLKD, drawn.sites)
    _summarised(stats, q, p, guide.has_density)
    groups["local"] = xr.Dataset(
        {name: (_axes(name, x, "sequence"), _numpy(x)) for name, x in state.parameters.items()}
    )
    return groups


def _weighed(drawn: Drawn, bounded: bool) -> dict[str, Float[Tensor, " B"]]:
    """k-hat, and, if log p(z) is known and not only up to a constant, the bounds and the KL in nats."""
    weights_SB = drawn.described.log_prior_SB - drawn.log_q_SB
    log_weights_SB = weights_SB + drawn.described.log_likelihood_SBT.sum(-1)
    found = {"pareto_k": pareto_k(log_weights_SB)}
    if not bounded:
        return found
    iwae_B = log_weights_SB.logsumexp(0) - np.log(len(log_weights_SB))
    return found | {"elbo": log_weights_SB.mean(0), "iwae": iwae_B, "kl": -weights_SB.mean(0)}


def _summarised(stats: xr.Dataset, q: Moments, p: Moments, has_density: bool) -> None:
    """Adds mean and scale of z under q, and the KL of its coordinates' Gaussian marginals, summed over each thought."""
    axes = ("sequence", *THOUGHTS)
    for name, x_BLKD in {"mean": q.mean, "sd": q.variance.sqrt(), "mcse_mean": q.mcse}.items():
        stats[name] = (axes, _numpy(x_BLKD))
    if has_density:
        stats["kl_by_thought"] = (axes[:-1], _numpy(marginal_kl(q, p).sum(-1)))


def _site(z_SBLKD: Tensor, sites: Sites) -> str | None:
    """The site that the thoughts are themselves, if there is one."""
    return next((name for name, x in sites.items() if x.shape == z_SBLKD.shape and torch.equal(x, z_SBLKD)), None)


def _prior_moments(model: Model, z_SBLKD: Tensor, sites: Sites) -> Moments:
    """Of p(z), which a site knows in closed form if it depends on no other."""
    own = _site(z_SBLKD, sites) if len(sites) == 1 else None
    known = closed_form(prior_sites(model, z_SBLKD.shape[1])[own]) if own else None
    return known or of_draws(_prior(model, 1000))


def _prior(model: Model, samples: int) -> Float[Tensor, "S L K D"]:
    with torch.no_grad():
        return model.sample_prior(samples)


def _chains(model: Model, batch: Batch, drawing: Drawing) -> Groups:
    """A reference posterior; the batch has one sequence."""
    found = sample(model, batch, drawing.method, drawing.samples, drawing.chains)
    groups = _described(found.sites, found.described, batch)
    stats = groups["sample_stats"]
    flat_SBLKD = found.described.z_SBLKD.flatten(0, 1)
    p = _prior_moments(model, flat_SBLKD, {name: x.flatten(0, 1) for name, x in found.sites.items()})
    _summarised(stats, of_draws(flat_SBLKD, torch.from_numpy(found.diagnostics["ess"])), p, has_density=True)
    for name, x_BLKD in found.diagnostics.items():
        stats[name] = (("sequence", *THOUGHTS), x_BLKD)
    return groups


def _described(sites: Sites, described: Described, batch: Batch) -> Groups:
    """Draws with leading axes chain and draw, as datasets."""
    z, log_prior, by_token = described
    by_sequence = by_token.sum(-1)
    shown = {name: x for name, x in sites.items() if x.shape != z.shape or not torch.equal(x, z)}
    renamed = {f"{name}_site" if name == "z" else name: x for name, x in shown.items()}
    lead = (*SAMPLES, "sequence")
    unscored = by_token.masked_fill(~batch.mask_BT, torch.nan)
    return {
        "posterior": xr.Dataset(
            {"z": ((*lead, *THOUGHTS), _numpy(z))} | {n: (_axes(n, x, *lead), _numpy(x)) for n, x in renamed.items()}
        ),
        "log_likelihood": xr.Dataset(
            {"by_token": ((*lead, "token"), _numpy(unscored)), "by_sequence": (lead, _numpy(by_sequence))}
        ),
        "sample_stats": xr.Dataset(
            {"lp": (lead, _numpy(log_prior + by_sequence)), "log_prior": (lead, _numpy(log_prior))}
        ),
    }


def _axes(name: str, x: Tensor, *lead: str) -> tuple[str, ...]:
    return (*lead, *(f"{name}_dim_{index}" for index in range(x.dim() - len(lead))))


def _texts(run: Run, found: Sequence[Piece]) -> Groups:
    """What was read, the document it is of, and its labels."""
    texts = [run.tokenizer.decode([x for x in piece.tokens if x != run.start_token]) for piece in found]
    names = sorted({name for piece in found for name in piece.text.labels})
    labels = {name: [piece.text.labels.get(name, "") for piece in found] for name in names}
    known = {"document": [piece.text.document for piece in found]} | labels
    return {
        "observed_data": xr.Dataset({"text": ("sequence", np.array(texts, dtype=object))}),
        "constant_data": xr.Dataset({name: ("sequence", np.array(x, dtype=object)) for name, x in known.items()}),
    }


def _replicas(run: Run, z: xr.DataArray, replicas: int, length: int) -> Groups:
    """Texts written from the first draws of z, as rows of tokens."""
    z_RBLKD = torch.from_numpy(z.values[0, :replicas]).to(run.device)
    rows = [written(run, z_BLKD, length) for z_BLKD in z_RBLKD]
    tokens = np.stack([_numpy(row) for row in rows])[None]
    return {"posterior_predictive": xr.Dataset({"tokens": ((*SAMPLES, "sequence", "token"), tokens)})}


def written(run: Run, z_BLKD: Float[Tensor, "B L K D"], length: int) -> Int[Tensor, "B T"]:
    """A text written from each z, at most ``length`` tokens up to the end of text; `MISSING` behind it."""
    seed = int(torch.randint(2**62, ()))
    keys = [(seed, index) for index in range(len(z_BLKD))]
    rows = write(run, [[]] * len(keys), z_BLKD, keys, Sampling(max_new_tokens=length))
    return torch.tensor([[*row, run.start_token, *[MISSING] * length][:length] for row in rows])


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
