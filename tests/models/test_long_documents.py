"""One z for a whole document: piece by piece, the figures equal those of one long row."""

import re

import pytest
import torch

from ltm_pyro.contracts import ThoughtShape, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel, PiecewiseDecoder
from ltm_pyro.utils.rng import seeded

SIZES = {"vocabulary": 30, "layers": 3, "width": 16, "heads": 2, "thoughts": 2, "window": 4}


def make_models(length, long, **options):
    torch.manual_seed(0)
    short = LatentThoughtModel(GaussianPrior(ThoughtShape(3, 2, 16)), Decoder(**SIZES, **options, length=length))
    whole = LatentThoughtModel(GaussianPrior(ThoughtShape(3, 2, 16)), Decoder(**SIZES, **options, length=long))
    whole.load_state_dict(short.state_dict())
    return short, whole


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("length", [10, 13, 31])
def test_a_document_in_pieces_is_one_long_row(length, options):
    short, whole = make_models(length, 64, **options)
    tokens_BT = torch.randint(30, (2, 57), generator=torch.Generator().manual_seed(1))
    batch = make_batch(tokens_BT, torch.tensor([57, 40]), start_token=0)
    inference = LocalInference(steps=4, rate=0.2)
    figures = []
    for model in (short.with_long_documents(), whole):
        guide = MeanField(model)
        with seeded(0):
            state, _ = infer_local(model, guide, batch, inference)
            terms = elbo_terms(model, guide, model.prepare(batch), state.parameters, Draws(8))
        figures.append((state.parameters, terms))
    torch.testing.assert_close(figures[0], figures[1], rtol=1e-10, atol=1e-10)


def test_a_window_without_room_is_refused():
    short, _ = make_models(9, 16)
    message = "A piece of 9 tokens, the model's length, has no room behind 9 tokens of context"
    with pytest.raises(UsageError, match=re.escape(message)):
        short.with_long_documents()


def test_the_context_can_be_shorter():
    """Without context the pieces are independent given z: as rows of their own, but for their positions."""
    decoder = Decoder(**SIZES, length=16)
    tokens_BT = torch.randint(30, (1, 40), generator=torch.Generator().manual_seed(1))
    z_BLKD = torch.randn(1, 3, 2, 16)
    with torch.no_grad():
        alone = PiecewiseDecoder(decoder, context=0)
        hidden = alone(alone.stem(tokens_BT), z_BLKD)
        second = decoder(decoder.stem(tokens_BT[:, 16:32], 16), z_BLKD, 16)
    torch.testing.assert_close(hidden[:, 16:32], second)
