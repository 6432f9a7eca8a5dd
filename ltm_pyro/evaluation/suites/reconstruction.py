"""Progressive reconstruction: how much of a text do the thoughts of layers 1 … l tell? (arXiv 2502.01567, section 4)

Shapes: B sequences, T tokens, L layers.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ltm_pyro.contracts import Batch
from ltm_pyro.evaluation.evaluate import BATCH, held_out
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import ThoughtSampling, draw, infer
from ltm_pyro.utils.statistics import ratio_standard_error


def parts(options: Options) -> list[Part]:
    """One curve, on the held-out part of the run's own data."""
    return [Part("held-out", partial(accuracy, options))]


def accuracy(options: Options, run: Run) -> Figures:
    """The share of tokens that are the likeliest given the tokens before them and one z ~ q(z | x), by l.

    Layers beyond l hear no thoughts; l = 0 is the decoder alone. The tokens before are the text's own.
    """
    dataset, layers = held_out(run), run.model.decoder.thought_shape.layers
    batches = DataLoader(
        Subset(dataset, range(len(dataset))[: options.limit]), batch_size=BATCH, collate_fn=dataset.collate
    )
    found, sizes = [], []
    for index, batch in enumerate(batches):
        with torch.no_grad():
            batch = run.model.prepare(batch.to(run.device))
            keys = [(options.seed, index, row) for row in range(batch.size)]
            state = infer(run, batch, options.inference(run), keys)
            z_BLKD = draw(run, batch, state, keys=keys).z_BLKD
            hits = [_hits(run, batch, z_BLKD, last) for last in range(layers + 1)]
        found.append(torch.stack(hits, dim=-1))
        sizes.append(batch.tokens_B)
    right_BL, tokens_B = torch.cat(found).double(), torch.cat(sizes).double()
    rate_L = right_BL.sum(0) / tokens_B.sum()
    stderr_L = ratio_standard_error(right_BL, tokens_B)
    curve = {f"accuracy_{layer}": rate for layer, rate in enumerate(rate_L.tolist())}
    errors = [None if error != error else error for error in stderr_L.tolist()]
    return {
        "accuracy": rate_L[-1].item(),
        "without_thoughts": rate_L[0].item(),
        "stderr": errors[-1],
        **curve,
        "stderr_by_layer": errors,
        "sequences": len(tokens_B),
        "tokens": int(tokens_B.sum()),
    }


def _hits(run: Run, batch: Batch, z_BLKD: Float[Tensor, "B L K D"], last: int) -> Int[Tensor, " B"]:
    """How many tokens of each sequence are the likeliest when layers 1 to ``last`` hear their thoughts."""
    decoder = run.model.decoder
    hidden_BTD = decoder(batch.stem_BTD, ThoughtSampling(layers=tuple(range(1, last + 1))).mask_layers(z_BLKD))
    likeliest_BT = F.linear(hidden_BTD, decoder.embedding.weight).argmax(-1)
    return ((likeliest_BT == batch.targets_BT) & batch.mask_BT).sum(-1)
