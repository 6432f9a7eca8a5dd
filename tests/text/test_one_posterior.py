"""One text has the same tokens, and so the same posterior, wherever it is packed, scored or analysed."""

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine

from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.data import pack_texts
from ltm_pyro.data.documents import Document
from ltm_pyro.data.encode import batch_of_rows, batches_of_like_length, encode_document, encode_documents, encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites import features
from ltm_pyro.inference import estimators
from ltm_pyro.inference.local import infer_local
from ltm_pyro.text import scoring, thoughts
from ltm_pyro.text.generation import generate, interpolate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score, score_continuations, score_tokens
from ltm_pyro.utils.rng import seeded

TEXT = "a long text and naïve café"


@pytest.fixture
def run(tiny_run):
    return tiny_run()


def packed(run):
    data = pack_texts([TEXT], run.tokenizer, run.length)
    estimators.fit_problem(run.model, run.guide, data.collate([data[0]]), run.inference, 2)


WHOLE = {
    "packed data": packed,
    "score": lambda run: score(run, [TEXT], Scoring(samples=2)),
    "draw_posterior": lambda run: draw_posterior(run, [TEXT], DrawOptions(samples=25)),
    "interpolate": lambda run: interpolate(run, (TEXT, TEXT), 2, Sampling(max_new_tokens=1)),
    "features": lambda run: features.run_extractor(run)([TEXT], 0),
}
BEGUN = {
    "generate": lambda run: generate(run, TEXT, Sampling(max_new_tokens=1)),
    "score_continuations": lambda run: score_continuations(run, [(TEXT, " of")], Scoring(samples=2)),
}


@pytest.fixture
def fitted(monkeypatch):
    """Every batch that q is fitted to, and the q of its first sequence alone, without keys."""
    found = []

    def spy(model, guide, batch, inference, *rest, **options):
        with torch.no_grad():
            one = model.prepare(batch.select(torch.tensor([0])))
        with seeded(3), poutine.block():  # the caller may have noise of its own
            found.append((batch, infer_local(model, guide, one, inference)[0].parameters))
        return infer_local(model, guide, batch, inference, *rest, **options)

    for module in (estimators, scoring, thoughts, features, import_module("ltm_pyro.analysis.draw_posterior")):
        monkeypatch.setattr(module, "infer_local", spy)
    return found


@pytest.mark.parametrize("door", WHOLE)
def test_a_whole_text_is_a_document_everywhere(run, fitted, door):
    WHOLE[door](run)
    batch, q = fitted[0]
    tokens = encode_document(run.tokenizer, TEXT)
    assert tokens == [*encode_prompt(run.tokenizer, TEXT), run.start_token]
    for targets_T, mask_T in zip(batch.targets_BT, batch.mask_BT, strict=True):
        assert targets_T[mask_T].tolist() == tokens
    WHOLE["packed data"](run)
    _, expected = fitted[-1]
    assert q.keys() == expected.keys()
    for name in q:
        torch.testing.assert_close(q[name], expected[name])


@pytest.mark.parametrize("door", BEGUN)
def test_a_text_that_goes_on_has_no_end(run, fitted, door):
    BEGUN[door](run)
    batch, _ = fitted[0]
    assert batch.targets_BT[batch.mask_BT].tolist() == encode_prompt(run.tokenizer, TEXT)


def test_the_end_of_a_scored_text_is_scored(tiny_run):
    """log p(text, end) = log p(text) + log p(end | text), without thoughts."""
    run = tiny_run(thoughts=0)
    tokens = encode_prompt(run.tokenizer, TEXT)
    (whole,) = score(run, [TEXT])
    text, end = score_tokens(run, [([], tokens), (tokens, [run.start_token])])
    assert whole.nats == pytest.approx(text.nats + end.nats)
    assert end.nats > 0.1
    assert (whole.tokens, whole.bytes) == (len(tokens) + 1, len(TEXT.encode()))


@pytest.mark.parametrize("text", [TEXT, "", "a" * 3, "the old model reads " * 9000])
def test_one_document_and_many_have_the_same_tokens(run, text):
    documents = [Document("a:0", "the old", "a"), Document("a:1", text, "a"), Document("a:2", "café", "a")]
    found = {number: [] for number in range(3)}
    for piece in encode_documents(enumerate(documents), run.tokenizer):
        found[piece.number] += piece.tokens.tolist()
    assert found == {n: encode_document(run.tokenizer, x.text) for n, x in enumerate(documents)}


def test_rows_are_padded_to_the_longest(run):
    batch = batch_of_rows([[3, 4], []], run.start_token, run.length)
    assert batch.targets_BT.tolist() == [[3, 4], [run.start_token] * 2]
    assert batch.tokens_B.tolist() == [2, 0]
    assert batch_of_rows([[]], run.start_token, run.length).targets_BT.shape == (1, 1)
    with pytest.raises(UsageError, match="A text has 25 tokens, but the model's length is 24: shorten it"):
        batch_of_rows([[1] * 25], run.start_token, run.length)


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 9))
def test_batches_of_like_length_are_a_partition_within_their_budget(lengths, size):
    batches = batches_of_like_length(lengths, size, 40)
    assert sorted(index for batch in batches for index in batch) == [*range(len(lengths))]
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= size * 40
        assert len(batch) <= 4 * size
    flat = [index for batch in batches for index in batch]
    assert flat == sorted(flat, key=lambda index: -lengths[index])  # the order of equal ones stays
    for batch in batches[:-1]:  # nothing is left that would have fitted in as well
        assert len(batch) == 4 * size or (len(batch) + 1) * lengths[batch[0]] > size * 40
