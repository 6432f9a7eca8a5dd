"""Text is written as asked: by seed, within the length, up to the end, from nothing but the prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro import generation
from ltm_pyro.contracts import UsageError
from ltm_pyro.data.tokenizer import end_of_text, train_tokenizer, vocabulary_size
from ltm_pyro.generation import Sampling, filter_logits, generate
from ltm_pyro.guides import MeanField
from ltm_pyro.inference import LocalInference
from ltm_pyro.runs import Run

TEXTS = ["the old model reads a long text and writes short words about time, naïve café 😀"] * 3
PROMPT = "the old"


@pytest.fixture
def run(tiny_model):
    """An untrained run of length 24; its text is noise, as bytes can be."""
    tokenizer = train_tokenizer(TEXTS, 280)
    model = tiny_model(vocabulary=vocabulary_size(tokenizer), length=24).eval()
    with torch.no_grad():
        model.decoder.embedding.weight[end_of_text(tokenizer)] = 0  # or it would mostly follow itself, and end there
    return Run(model, MeanField(model), tokenizer, LocalInference(steps=3), "nowhere", 24)


@pytest.fixture
def written(monkeypatch):
    """The tokens of every text, as they are decoded."""
    rows, decode = [], generation._decode
    monkeypatch.setattr(generation, "_decode", lambda run, tokens: rows.append(tokens) or decode(run, tokens))
    return rows


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_a_seed_gives_one_text(run, prompt):
    first, again, other = (generate(run, prompt, samples=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 3


def test_the_seed_leaves_other_noise_alone(run):
    before = torch.get_rng_state()
    generate(run, PROMPT)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_top_1_takes_the_likeliest(run, written, prompt, monkeypatch):
    seen = []
    think = generation._thoughts
    monkeypatch.setattr(generation, "_thoughts", lambda *arguments: seen.append(think(*arguments)) or seen[0])
    generate(run, prompt, sampling=Sampling(top_k=1, max_new_tokens=8))
    (tokens,) = written
    ids = [run.start_token, *run.tokenizer.encode(prompt).ids]
    decoder = run.model.decoder
    for token in tokens:
        hidden = decoder(decoder.stem(torch.tensor([ids])), seen[0])
        assert token == int((hidden[0, -1] @ decoder.embedding.weight.T).argmax())
        ids.append(token)


def test_nothing_but_the_prompt_is_seen(run, monkeypatch):
    batches = []
    fit = generation.fit
    monkeypatch.setattr(generation, "fit", lambda m, g, batch, *more: batches.append(batch) or fit(m, g, batch, *more))
    generate(run, PROMPT, samples=4, sampling=Sampling(max_new_tokens=5))
    generate(run, "", samples=2)
    (batch,) = batches  # one fit for four texts, none without a prompt
    assert batch.targets_BT.tolist() == [run.tokenizer.encode(PROMPT).ids]
    assert batch.mask_BT.all()


def test_it_stops_at_the_end_and_at_the_length(run, written):
    generate(run, PROMPT, samples=20, sampling=Sampling(max_new_tokens=500))
    assert {len(tokens) for tokens in written} == {24 - len(run.tokenizer.encode(PROMPT).ids)}
    generate(run, PROMPT, 3, Sampling(max_new_tokens=5))
    assert {len(tokens) for tokens in written[20:]} == {5}
    for tokens in written:  # behind the end there is nothing but the end
        end = tokens.index(run.start_token) if run.start_token in tokens else len(tokens)
        assert set(tokens[end:]) <= {run.start_token}


def test_the_end_ends_the_text(run):
    text = run.tokenizer.encode("the old").ids
    assert generation._decode(run, [*text, run.start_token, *text]) == "the old"
    assert generation._decode(run, [run.start_token]) == ""


def test_no_replacement_characters(run):
    texts = generate(run, samples=50, seed=3)
    assert not [text for text in texts if "\N{REPLACEMENT CHARACTER}" in text]
    smile = run.tokenizer.encode("ok 😀").ids
    assert generation._decode(run, smile[:-1]) == "ok "


def test_a_prompt_too_long(run):
    with pytest.raises(UsageError, match="length is 24: shorten it"):
        generate(run, PROMPT * 20)


@settings(max_examples=60, deadline=None)
@given(top_k=st.integers(0, 12), top_p=st.floats(0.01, 1), temperature=st.floats(0.05, 5), seed=st.integers(0, 99))
def test_filter_keeps_the_smallest_nucleus(top_k, top_p, temperature, seed):
    logits = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = filter_logits(logits, Sampling(top_k=top_k, top_p=top_p, temperature=temperature)).isfinite()
    p = (logits / temperature).softmax(-1)
    for row in range(2):
        order, mass, chosen = p[row].argsort(descending=True).tolist(), 0.0, set()
        for token in order[: top_k or None]:
            if mass >= top_p and chosen:
                break
            chosen.add(token)
            mass += float(p[row, token])
        assert set(kept[row].nonzero()[:, 0].tolist()) == chosen


def test_temperature_divides():
    logits = torch.randn(2, 5)
    torch.testing.assert_close(filter_logits(logits, Sampling(temperature=0.5)), logits * 2)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_without_sense(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)
