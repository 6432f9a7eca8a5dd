"""Progressive reconstruction: token accuracy given the thoughts of layers 1 … l (arXiv 2502.01567, section 4).

Shapes: B sequences, T tokens, L layers.
"""

from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ltm_pyro.contracts import Batch, whole_pieces
from ltm_pyro.contracts import Part as DocumentPart
from ltm_pyro.evaluation.evaluate import batches_of, held_out
from ltm_pyro.evaluation.suites.suite import Figures, Options, Part
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import ThoughtSampling, draw_thoughts
from ltm_pyro.utils.statistics import clustered_ratio


def parts(options: Options) -> list[Part]:
    """One curve, on the held-out split of the run's own data."""
    return [Part("held-out", partial(token_accuracy, options))]


def token_accuracy(options: Options, run: Run) -> Figures:
    """The share of tokens that are the most likely ones given the text before them and one z ~ q(z | x), by l.

    Layers above l do not attend to their thoughts; l = 0 is the decoder without thoughts.
    """
    dataset, layers = held_out(run), run.model.decoder.thought_shape.layers
    batches = batches_of(dataset, range(len(dataset))[: options.limit])
    found, sizes = [], []
    parts: list[tuple[DocumentPart, ...]] = []
    for batch in batches:
        with torch.no_grad():
            batch = run.model.prepare(batch.to(run.device))
            keys = RowKeys.of_batch(batch, options.seed)
            state, _ = infer_local(run.model, run.guide, batch, options.inference(run), keys=keys)
            z_BLKD = draw_thoughts(run, batch, state, keys=keys).z_BLKD
            hits = [_hits(run, batch, z_BLKD, last) for last in range(layers + 1)]
        found.append(torch.stack(hits, dim=-1))
        sizes.append(batch.tokens_B)
        parts += batch.parts or ()
    right_BL, tokens_B = torch.cat(found).double(), torch.cat(sizes).double()
    pieces = whole_pieces(parts)
    documents_B = torch.tensor([piece.number for piece in pieces]) if pieces else None
    rate_L, stderr_L, *_ = clustered_ratio(right_BL, tokens_B, documents_B)
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
    """Correctly predicted tokens per sequence when layers 1 to ``last`` attend to their thoughts."""
    decoder, masked_BLKD = run.model.decoder, ThoughtSampling(layers=tuple(range(1, last + 1))).mask_layers(z_BLKD)
    hidden_BTD = decoder(cast(Tensor, batch.stem_BTD), masked_BLKD)
    likeliest_BT = decoder.logits(hidden_BTD).argmax(-1)
    return ((likeliest_BT == batch.targets_BT) & batch.mask_BT).sum(-1)
