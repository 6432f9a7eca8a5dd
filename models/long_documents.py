"""One z for a whole document, however long: the decoder runs over it piece by piece.

Shapes: B documents, T tokens, L layers, K thoughts per layer, D width.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.errors import UsageError
from ltm_pyro.models.decoder import Decoder


class PiecewiseDecoder(nn.Module):
    r"""A decoder for documents of any length: :math:`p(x \mid z) = \prod_t p(x_t \mid z, x_{t-C \ldots t-1})`, one z.

    The document is cut into pieces that are conditionally independent given z and the ``context`` tokens before each,
    which are read again and not scored. With ``context`` = layers · (window − 1), the decoder's whole reach and the
    default, the hidden states equal those of one long row. In the backward pass a piece is computed again, and the
    gradients with respect to z add up over the pieces: what has to fit in memory is the activations of one piece of
    ``length`` tokens and the hidden states of the document, B · T · D numbers. Positions run on through the document,
    beyond those that the decoder was trained with.

    Args:
        decoder: the network, unchanged and shared.
        context: C, tokens that are read again before each piece.

    Raises:
        UsageError: the context leaves no room for a token in a row of the decoder's length.
    """

    def __init__(self, decoder: Decoder, context: int | None = None) -> None:
        super().__init__()
        if decoder.positions is not None:
            raise UsageError(
                f"This model has learned embeddings of {decoder.length} positions, and a long document has more: leave "
                f"`position_embeddings` out."
            )
        reach = decoder.layers * (decoder.window - 1)
        self.decoder, self.context = decoder, reach if context is None else context
        self.step = decoder.length - self.context
        if self.context < 0 or self.step < 1:
            raise UsageError(
                f"A piece of {decoder.length} tokens, the model's length, has no room behind {self.context} tokens of "
                f"context (layers x (window - 1) is {reach}): give a `context` from 0 to {decoder.length - 1}."
            )
        self.vocabulary, self.thought_shape = decoder.vocabulary, decoder.thought_shape
        self.length = 2**31  # of a document

    @property
    def embedding(self) -> nn.Embedding:
        """The decoder's embedding, tied to its output layer."""
        return self.decoder.embedding

    def stem(self, inputs_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The part that z does not enter."""
        parts = []
        for begin, first, last in self._pieces(inputs_BT.shape[1]):
            parts.append(self.decoder.stem(inputs_BT[:, begin:last], begin)[:, first - begin :])
        return torch.cat(parts, 1)

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"] | None
    ) -> Float[Tensor, "... B T D"]:
        """The last hidden states of the whole document."""
        parts = []
        for begin, first, last in self._pieces(stem_BTD.shape[1]):
            piece_BTD = stem_BTD[:, begin:last]
            if torch.is_grad_enabled():
                hidden = cast(Tensor, checkpoint(self.decoder, piece_BTD, z_BLKD, begin, use_reentrant=False))
            else:
                hidden = self.decoder(piece_BTD, z_BLKD, begin)
            parts.append(hidden[..., first - begin :, :])
        return torch.cat(parts, -2)

    def logits(self, hidden_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Unnormalised log-probabilities of all tokens."""
        return self.decoder.logits(hidden_BTD)

    def _pieces(self, length: int) -> list[tuple[int, int, int]]:
        """Of each piece: where its context begins, its first token, and the one behind its last."""
        edges = [*range(self.decoder.length, length, self.step)]  # the first piece needs no context
        firsts = [0, *edges]
        return [
            (max(first - self.context, 0), first, last) for first, last in zip(firsts, [*edges, length], strict=True)
        ]
