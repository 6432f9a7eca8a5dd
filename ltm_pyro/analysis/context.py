"""How the posterior changes with the length of the context: q fitted to longer and longer beginnings of a text.

Shapes: P lengths of context, B sequences.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from ltm_pyro.analysis.draws import draw_from_guide, token_log_likelihood
from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import missing_bound
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.inference.state import LocalInference

DRAWS, FEW = 64, 8  # draws for the KL, and for the nats of the rest of the text


def shift(
    model: Model, guide: Guide, batch: Batch, inference: LocalInference, lengths: Sequence[int], seed: int = 0
) -> xr.Dataset:
    """The posterior given the first tokens of each text, for several context lengths.

    By length and sequence: ``kl_to_prior`` in nats; ``nats`` per token of the rest of the text, averaged over draws
    (NaN if there is no rest); ``distance``, the Euclidean distance from the mean of q to its mean at the last length.
    Only the whole text ends with `END_OF_TEXT`.
    """
    if len(lengths) < 2 or min(lengths) < 1 or max(lengths) > batch.inputs_BT.shape[1]:
        raise UsageError(f"Context needs two or more lengths from 1 to {batch.inputs_BT.shape[1]}, got {[*lengths]}.")
    if reason := missing_bound(model, guide):
        raise UsageError(f"There is no KL to the prior: {reason}.")
    kl, means, rest = [], [], []
    with torch.no_grad():
        batch = model.prepare(batch)
        for length in lengths:
            context = batch.crop(0, length)  # q must not depend on later tokens
            keys = RowKeys.of_batch(context, seed)
            with fix_global_draws(model, seed):
                state, _ = infer_local(model, guide, context, inference, keys=keys)
                drawn = draw_from_guide(model, guide, context, state.parameters, DRAWS, keys.fold_in("context"))
            z_SBLKD, log_prior_SB, _ = drawn.densities
            means.append(z_SBLKD.mean(0))
            kl.append((drawn.log_q_SB - log_prior_SB).mean(0))
            nats_BT = -torch.stack([token_log_likelihood(model, batch, z_BLKD) for z_BLKD in z_SBLKD[:FEW]]).mean(0)
            rest.append(nats_BT[:, length:].sum(-1))
    left = [(batch.tokens_B - length).clamp(min=0) for length in lengths]
    nats = [torch.where(n > 0, total / n.clamp(min=1), torch.nan) for total, n in zip(rest, left, strict=True)]
    distance = [(mean - means[-1]).flatten(1).norm(dim=1) for mean in means]
    data = {"kl_to_prior": kl, "nats": nats, "distance": distance}
    axes = ("context", "sequence")
    found = {name: (axes, torch.stack(x).numpy()) for name, x in data.items()}
    return xr.Dataset(found, {"context": np.array(lengths)})


def default_lengths(posterior: Posterior) -> list[int]:
    """1/8, 1/4, 1/2, 3/4 and all of the longest sequence, in tokens."""
    length = posterior.group(TEXT).sizes["token"]
    return sorted({max(1, round(length * share)) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)})
