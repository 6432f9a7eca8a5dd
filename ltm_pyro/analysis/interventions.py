"""How the decoder uses the thoughts: ablation, interpolation between two texts, and attention weights.

Shapes: S draws, B sequences, T tokens, L layers, K thoughts, D width, H heads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ltm_pyro.analysis.draw_posterior import write_tokens
from ltm_pyro.analysis.draws import token_log_likelihood
from ltm_pyro.analysis.information import observed_batch
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.contracts import Batch, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.estimators import TOKENS_AT_ONCE
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.nn.layers import CrossAttention
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import clustered_mean
from ltm_pyro.utils.threads import one_at_a_time

DRAWS = 4


@seeded(0)
def ablate(model: Model, posterior: Posterior, start_token: int = 0, draws: int = DRAWS) -> xr.Dataset:
    r"""Ablation: the log-likelihood per sequence that is lost without a layer's or a thought's information, in nats.

    .. math:: E_q[\log p(x \mid z)] - E_q[\log p(x \mid z_{\setminus k}, \tilde z_k)], \qquad \tilde z_k \sim p(z_k)

    The ablated thoughts are drawn from the prior instead of q. ``by_layer`` and ``by_thought`` are averages over
    sequences and ``draws`` draws, ``*_stderr`` their standard errors over documents, NaN for a single one.
    """
    z_SBLKD = torch.from_numpy(posterior.z.values[0, :draws])
    prior_SLKD = torch.from_numpy(posterior.group("prior")["z"].values[0])
    other_SBLKD = prior_SLKD[torch.arange(z_SBLKD[..., 0, 0, 0].numel()) % len(prior_SLKD)].view_as(z_SBLKD)
    batch = observed_batch(posterior, start_token)
    whole_B = _log_likelihood(model, batch, z_SBLKD)
    _, _, layers, thoughts, _ = z_SBLKD.shape
    without = torch.zeros(layers, thoughts, dtype=torch.bool)
    lost = {}
    for layer in range(layers):
        for places in (slice(None), *range(thoughts)):
            chosen = without.clone()
            chosen[layer, places] = True
            mixed = torch.where(chosen[..., None], other_SBLKD, z_SBLKD)
            lost[layer, places if isinstance(places, int) else None] = whole_B - _log_likelihood(model, batch, mixed)
    by_layer = torch.stack([lost[layer, None] for layer in range(layers)])
    by_thought = torch.stack([torch.stack([lost[layer, k] for k in range(thoughts)]) for layer in range(layers)])
    axes = ("layer", "thought")
    documents = posterior.documents
    found = {"by_layer": (axes[:1], by_layer), "by_thought": (axes, by_thought)}
    figures = {name: (at, clustered_mean(x.movedim(-1, 0), documents)) for name, (at, x) in found.items()}
    means = {name: (at, x.value) for name, (at, x) in figures.items()}
    numbers = {axis: posterior.z.coords[axis] for axis in axes}  # from 1
    return xr.Dataset(means | {f"{name}_stderr": (at, x.stderr) for name, (at, x) in figures.items()}, numbers)


def _log_likelihood(model: Model, batch: Batch, z_SBLKD: Tensor) -> Tensor:
    """log p(x | z) of each sequence, averaged over draws, in nats."""
    size = max(1, TOKENS_AT_ONCE // batch.inputs_BT.shape[1])
    chunks = torch.arange(batch.size).split(size)
    return torch.cat(
        [
            torch.stack([token_log_likelihood(model, batch.select(i), z[i]).sum(-1) for z in z_SBLKD]).mean(0)
            for i in chunks
        ]
    )


class Step(NamedTuple):
    """A point between two texts: the weight of the second, the text generated there, and both texts' −log p(x | z)."""

    share: float
    text: str
    nats_first: float
    nats_second: float


@one_at_a_time
def interpolate(run: Run, posterior: Posterior, first: int, second: int, steps: int = 5, seed: int = 0) -> list[Step]:
    """Texts generated along the line between the means of two sequences' q, with one random seed for all points."""
    if steps < 2:
        raise UsageError(f"An interpolation needs at least 2 steps, got {steps}.")
    pair = posterior.select([first, second])
    ends, batch = torch.from_numpy(pair.stats["mean"].values), observed_batch(pair, run.start_token)
    ends_keys = RowKeys.of_batch(batch, seed)
    keys = ends_keys._replace(key_B=ends_keys.key_B.sum(0, keepdim=True))  # one noise for all points, both ways
    path = []
    for share in torch.linspace(0, 1, steps).tolist():
        z_LKD = torch.lerp(ends[0], ends[1], share)
        nats = -token_log_likelihood(run.model, batch, torch.stack([z_LKD, z_LKD])).sum(-1)
        row = write_tokens(run, z_LKD[None], batch.inputs_BT.shape[1], keys)[0]
        path.append(Step(share, decode_row(run, row), *nats.tolist()))
    return path


def decode_row(run: Run, row: Any) -> str:
    """The text of a row of tokens, without padding and end of text."""
    return run.tokenizer.decode([int(x) for x in row if x >= 0 and x != run.start_token])


@seeded(0)
def attention(run: Run, posterior: Posterior, sequence: int) -> xr.DataArray:
    """The cross-attention weights of each token on the thoughts of each layer, averaged over heads, at the mean of q.

    Axes: layer, token, thought; the weights of each token sum to 1.
    """
    one = posterior.select([sequence])
    batch, found = observed_batch(one, run.start_token), []

    def record_weights(module: Any, arguments: tuple[Any, ...]) -> None:
        x_BTD, turn, thoughts = arguments
        q_BHTC = module.queries(x_BTD, turn)
        found.append((q_BHTC @ thoughts.keys_BHKC.mT * q_BHTC.shape[-1] ** -0.5).softmax(-1).mean(1)[0])

    sublayers = [m for m in run.model.decoder.modules() if isinstance(m, CrossAttention)]
    hooks = [m.register_forward_pre_hook(record_weights) for m in sublayers]
    try:
        token_log_likelihood(run.model, batch, torch.from_numpy(one.stats["mean"].values))
    finally:
        for hook in hooks:
            hook.remove()
    length = int(batch.tokens_B[0])
    weights = np.stack([x_TK.detach().numpy()[:length] for x_TK in found])
    numbers = {"layer": np.arange(len(weights)) + 1, "thought": np.arange(weights.shape[-1]) + 1}
    return xr.DataArray(weights, numbers, ("layer", "token", "thought"))
