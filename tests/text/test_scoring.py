"""Scores of texts and continuations: against the estimators, against plain sums, and blind to the future."""

from dataclasses import replace

import pytest
import torch

from ltm_pyro.data import pack_texts
from ltm_pyro.data.encode import batch_of_rows, encode_document, encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import Point
from ltm_pyro.inference.estimators import ESTIMATORS, OF_A_BATCH, evaluate
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.text import scoring
from ltm_pyro.text.scoring import Scoring, score, score_continuations, score_tokens

CONTEXTS = ["the old", "", "a long text and"]
OF_TEXTS = [name for name in ESTIMATORS if name not in OF_A_BATCH]
OF_CONTINUATIONS = [name for name in OF_TEXTS if name != "ais"]  # which scores whole texts
CONTINUATIONS = [" model reads", "short", " words about time"]


@pytest.fixture
def run(tiny_run):
    return tiny_run()


def encode(run, text):
    return encode_prompt(run.tokenizer, text)


def nats(run, pairs, estimator, **options):
    return [found.nats_U for found in score_tokens(run, pairs, Scoring(estimator=estimator, samples=3, **options))]


@pytest.mark.parametrize(
    "estimator", [pytest.param(name, marks=[pytest.mark.slow] * (name == "ais")) for name in OF_TEXTS]
)
def test_texts_cost_what_the_estimator_says(run, estimator):
    """One row of packed data, as `evaluate` scores it, and the same tokens as a text."""
    text = "writes short words"
    data = pack_texts([text], run.tokenizer, run.length)
    tokens = encode_document(run.tokenizer, text)
    batch = data.collate([data[0]]).crop(0, len(tokens))  # without its padding
    assert batch.targets_BT.tolist() == [tokens]
    expected = evaluate(run.model, run.guide, [batch], run.inference, [estimator], samples=3)
    (found,) = score(run, [text], Scoring(estimator=estimator, samples=3))
    assert (found.tokens, found.bytes) == (len(tokens), len(text))
    assert found.nats == pytest.approx(expected.estimates[estimator].nats_per_token * len(tokens))


def test_a_long_text_is_the_sum_of_its_pieces(tiny_run):
    run = tiny_run(thoughts=0)  # so that no noise is left
    text = "the old model reads a long text and writes short words"
    tokens = encode_document(run.tokenizer, text)
    assert len(tokens) > run.length
    (whole,) = score(run, [text])
    pieces = [([], tokens[i : i + run.length]) for i in range(0, len(tokens), run.length)]
    assert whole.nats == pytest.approx(sum(map(sum, nats(run, pieces, "iwae"))))


@pytest.mark.parametrize("estimator", OF_CONTINUATIONS)
def test_without_thoughts_it_is_the_likelihood(tiny_run, estimator):
    run = tiny_run(thoughts=0)
    context, tokens = encode(run, CONTEXTS[2]), encode(run, CONTINUATIONS[2])
    ids = torch.tensor([[run.start_token, *context, *tokens]])
    z = torch.zeros(1, *run.model.decoder.thought_shape)
    hidden = run.model.decoder(run.model.decoder.stem(ids[:, :-1]), z)[0, len(context) :]
    log_p = (hidden @ run.model.decoder.embedding.weight.T).log_softmax(-1)
    (found,) = score_tokens(run, [(context, tokens)], Scoring(estimator=estimator, samples=3, block=2))
    torch.testing.assert_close(torch.tensor(found.nats_U), -log_p[range(len(tokens)), tokens])
    assert found.likeliest_U == (log_p.argmax(-1) == torch.tensor(tokens)).tolist()
    assert found.is_greedy == all(found.likeliest_U)


def test_draws_are_averaged_as_the_formula_says(run, monkeypatch):
    """−log of the weighted sum of p(y | x, z_s) over the sum of weights, at the very draws that were made."""
    drawn, draw = [], scoring.draw_thoughts
    monkeypatch.setattr(scoring, "draw_thoughts", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    context, tokens = encode(run, CONTEXTS[2]), encode(run, CONTINUATIONS[2])
    (found,) = nats(run, [(context, tokens)], "iwae")
    ((z, log_weight),) = drawn
    ids = torch.tensor([[run.start_token, *context, *tokens]])
    hidden = run.model.decoder(run.model.decoder.stem(ids[:, :-1]), z)[:, 0, len(context) :]
    log_p = (hidden @ run.model.decoder.embedding.weight.T).log_softmax(-1)[:, range(len(tokens)), tokens]
    weight = log_weight[:, 0].softmax(0)
    expected = -(weight @ log_p.sum(1).exp()).log()
    assert sum(found) == pytest.approx(expected.item())
    assert log_weight.std() > 0.1


@pytest.mark.parametrize("estimator", OF_CONTINUATIONS)
def test_the_future_does_not_leak(run, estimator, monkeypatch):
    """Other tokens from position n on leave every figure before n as it was."""
    pairs = [(encode(run, c), encode(run, y)) for c, y in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    before = nats(run, pairs, estimator, block=2)
    for n in (1, 2, 3):
        changed = [(c, [*y[:n], *((t + 7) % 270 + 1 for t in y[n:])]) for c, y in pairs]
        after = nats(run, changed, estimator, block=2)
        assert [row[:n] for row in after] == [row[:n] for row in before]
        assert [row[n:] for row in after] != [row[n:] for row in before]


def test_a_leak_would_be_seen(run, monkeypatch):
    """The test above has the power to fail: with z fitted to the whole text, earlier figures change."""
    draw = scoring.draw_thoughts
    whole = {}
    monkeypatch.setattr(
        scoring, "infer_local", lambda m, g, context, *rest, **keys: whole["fit"](m, g, whole["batch"], *rest, **keys)
    )
    context, tokens = encode(run, CONTEXTS[2]), encode(run, CONTINUATIONS[2])
    found = []
    for last in (tokens[-1], tokens[-1] + 5):
        batch = batch_of_rows([[*context, *tokens[:-1], last]], run.start_token, run.length)
        whole.update(fit=infer_local, batch=batch)
        found += nats(run, [(context, [*tokens[:-1], last])], "iwae")
    assert draw is scoring.draw_thoughts
    assert found[0][:-1] != found[1][:-1]


def test_causal_fits_again_to_what_came_before(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        scoring,
        "infer_local",
        lambda m, g, context, *rest, **keys: seen.append(context) or infer_local(m, g, context, *rest, **keys),
    )
    pairs = [(encode(run, "the old"), encode(run, " model")), ([], encode(run, " words about time"))]
    found = nats(run, pairs, "causal", block=3)
    assert [len(row) for row in found] == [len(y) for _, y in pairs]
    lengths = [context.tokens_B.tolist() for context in seen]
    longest = len(pairs[1][1])
    assert lengths[0] == [len(pairs[0][0]), 0]
    assert [row[-1] for row in lengths] == list(range(0, longest, 3))


@pytest.fixture
def fitted(monkeypatch):
    """The rows of tokens that q is fitted to, and with how many tokens of padding."""
    rows, padding = [], []

    def watched(model, guide, batch, inference, *rest, **options):
        if inference.steps:
            lengths = batch.tokens_B.tolist()
            rows.extend(tuple(x[:n].tolist()) for x, n in zip(batch.targets_BT, lengths, strict=True))
            padding.append(batch.inputs_BT.numel() - sum(lengths))
        return infer_local(model, guide, batch, inference, *rest, **options)

    monkeypatch.setattr(scoring, "infer_local", watched)
    return rows, padding


@pytest.mark.parametrize("estimator", OF_CONTINUATIONS)
@pytest.mark.parametrize("room", [scoring.LOGITS_AT_ONCE, 1], ids=["at once", "row by row"])
def test_choices_of_one_question_share_a_fit_and_their_draws(run, fitted, monkeypatch, estimator, room):
    """The answers are those of separate fits with the same draws: of each choice by itself."""
    pairs = [(encode(run, c), encode(run, y)) for c in CONTEXTS for y in [*CONTINUATIONS, " day"]]
    alone = [nats(run, [pair], estimator, block=3)[0] for pair in pairs]
    separate = len(fitted[0])
    fitted[0].clear()
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", room)
    found = nats(run, pairs, estimator, block=3)
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-8)
    without_q = estimator in ("prior", "prior_iwae", "causal_prior")
    texts = {tuple(c) for c, _ in pairs}
    if estimator == "causal":  # and what is before each later block
        texts |= {(*c, *y[:n]) for c, y in pairs for n in range(3, len(y), 3)}
    assert len(fitted[0]) == len({*fitted[0]}) == len(texts) * (not without_q)
    assert separate - len(fitted[0]) == 3 * len(CONTEXTS) * (not without_q)


def test_causal_without_inference_draws_from_the_prior(run):
    """As `prior_iwae` does, in one block; its q does not count, however far it is fitted."""
    pairs = [(encode(run, CONTEXTS[2]), encode(run, CONTINUATIONS[2]))]
    options = {"estimator": "causal_prior", "samples": 4, "block": 99}
    found = [
        score_tokens(run, pairs, Scoring(**options, inference=LocalInference(steps=steps, rate=1.0)))
        for steps in (0, 9)
    ]
    assert found[0] == found[1] != score_tokens(run, pairs, Scoring(**options | {"estimator": "causal"}))
    without = [([], encode(run, CONTINUATIONS[2]))]  # where no text is before it, they are the same
    expected = score_tokens(run, without, Scoring(estimator="prior_iwae", samples=4))
    assert score_tokens(run, without, Scoring(**options)) == expected


def test_batches_hold_as_many_tokens_as_rows_of_full_length(run, fitted, monkeypatch):
    contexts = [[1 + i % 250] * (1 if i % 4 else 20) for i in range(64)]
    pairs = [([*context, 5 + i], [3]) for i, context in enumerate(contexts)]
    in_order = [pairs[i : i + 4] for i in range(0, 64, 4)]
    for part in in_order:
        nats(run, part, "bound", batch_size=4)
    before, batches = sum(fitted[1]), len(fitted[1])
    for seen in fitted:
        seen.clear()
    nats(run, pairs, "bound", batch_size=4)
    assert sum(fitted[1]) == 0 < before
    assert len(fitted[1]) == 4 + 48 / 16 < batches


def test_continuations_are_tokenised_apart(run):
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    tokens = [(encode(run, c), encode(run, y)) for c, y in pairs]
    assert score_continuations(run, pairs) == score_tokens(run, tokens)


def test_a_seed_gives_the_same_scores(run):
    first, again, other = (score(run, ["the old model"], Scoring(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_q_starts_where_inference_says(run):
    still = Scoring(estimator="bound", inference=LocalInference(steps=0), samples=4000)
    moved = replace(still, estimator="prior")
    (at_prior,), (prior,) = score(run, ["the old"], still), score(run, ["the old"], moved)
    assert at_prior.nats == pytest.approx(prior.nats, rel=0.02)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("Text 1 is empty", lambda run: score(run, ["the", ""])),
        ("A list of texts is scored, got 'the old'", lambda run: score(run, "the old")),
        ("Continuation 0 is empty", lambda run: score_continuations(run, [("the", "")])),
        ("length is 24: shorten the context", lambda run: score_continuations(run, [("the old" * 9, " model")])),
        ("Unknown estimator 'elbo'", lambda run: Scoring(estimator="elbo")),
        ("Samples must be at least 1", lambda run: Scoring(samples=0)),
        ("≥ 1, got 0 and 32", lambda run: Scoring(block=0)),
        ("≥ 1, got 16 and 0", lambda run: Scoring(batch_size=0)),
        ("A context of 4 tokens has no meaning for longer texts that are split", lambda run: Scoring(context=4)),
        ("A context of -1 tokens has no meaning", lambda run: Scoring(longer="whole", context=-1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(run, message, call):
    with pytest.raises(UsageError, match=message):
        call(run)


def test_without_a_density_there_is_no_bound(run):
    run = run._replace(guide=Point(run.model))
    with pytest.raises(
        UsageError, match="No figure for bound: Point has no density; ask for prior, prior_iwae, causal"
    ):
        score(run, ["short"], Scoring(estimator="bound"))
    assert score(run, ["short"], Scoring(estimator="causal"))[0].nats > 0


def test_a_long_text_is_scored_under_one_z_as_in_one_long_row(tiny_run):
    text = "the people read a long text about time, " * 3
    short, long = tiny_run(), tiny_run(length=512)
    long.model.load_state_dict(short.model.state_dict())
    assert short.length < len(encode_document(short.tokenizer, text)) < long.length
    for estimator in ("bound", "iwae", "causal"):
        whole = Scoring(estimator=estimator, samples=4, longer="whole")
        (one,), (other,) = score(short, [text], whole), score(long, [text], whole)
        assert one.nats == pytest.approx(other.nats, rel=1e-9)
        assert score(short, [text], replace(whole, longer="split"))[0].nats != pytest.approx(one.nats)


def test_a_window_that_sees_a_whole_row_needs_a_shorter_context(tiny_run):
    """Without context, pieces are rows of their own that share one z; with the decoder's reach, they are one row."""
    wide, text = tiny_run(window=16), "the people read a long text about time, " * 3
    reach = wide.model.decoder.layers * 15
    assert reach >= wide.length
    whole = Scoring(samples=4, longer="whole")
    with pytest.raises(UsageError, match=rf"no room behind {reach} tokens .*: give a `context` from 0 to 23"):
        score(wide, [text], whole)
    found = [score(wide, [text], replace(whole, context=context))[0].nats for context in (0, 8, 23)]
    assert len({*found}) == 3
    narrow = tiny_run()
    reach = narrow.model.decoder.layers * (narrow.model.decoder.window - 1)
    assert score(narrow, [text], replace(whole, context=reach)) == score(narrow, [text], whole)


def test_annealing_is_for_whole_texts(run):
    with pytest.raises(UsageError, match="The estimator ais scores whole texts, not continuations: choose iwae"):
        nats(run, [([1], [2])], "ais")


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_a_figure_of_several_texts_is_refused_for_one(name):
    with pytest.raises(UsageError, match="is of several texts: ask `ltm evaluate`"):
        Scoring(estimator=name)
