"""Text is written as asked: by seed and place, within the length, up to the end, from nothing but the prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.data.encode import batch_of_rows, encode_prompt
from ltm_pyro.data.tokenizer import train_tokenizer
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import SparsePrior
from ltm_pyro.text import generation, thoughts
from ltm_pyro.text.generation import decode, generate, interpolate, prompt_keys
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.streaming import TextDecoder, TextStreamer, token_texts
from ltm_pyro.text.thoughts import ThoughtSampler, ThoughtSampling, draw_thoughts

PROMPT = "the old"
PROMPTS = ["the old", "", "a long text and short", "naïve café 😀"]  # 2 to 9 tokens, the window is 4


@pytest.fixture
def run(tiny_run):
    return tiny_run()


@pytest.fixture
def written(monkeypatch):
    """The prompts, thoughts and new tokens of every call of `write`."""
    calls, write = [], generation.write

    def spy(run, rows, z, *rest, **options):
        found = write(run, rows, z, *rest, **options)
        calls.append((rows, z, found))
        return found

    monkeypatch.setattr(generation, "write", spy)
    return calls


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_a_seed_gives_one_text(run, prompt):
    first, again, other = (generate(run, prompt, Sampling(num_return_sequences=3), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 3


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3]])
def test_what_all_sequences_share_depends_on_the_seed_alone(run, prompts):
    run.model.prior = SparsePrior(run.model.decoder.thought_shape)
    run = run._replace(guide=MeanField(run.model))
    first, *_ = generate(run, prompts, seed=3)
    torch.manual_seed(5)
    assert generate(run, PROMPT, seed=3) == [first]
    scale = run.model.prior.scale
    assert not torch.equal(scale(), scale()), "nothing stays fixed afterwards"


def test_a_generator_draws_the_seed(run):
    first, again = (generate(run, PROMPT, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == again != generate(run, PROMPT)


def test_the_seed_leaves_other_noise_alone(run):
    before = torch.get_rng_state()
    generate(run, PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "thought_sampling",
    [ThoughtSampling(), ThoughtSampling(refit_every=3, candidates=3)],
    ids=["once", "again, from candidates"],
)
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_batch_of_mixed_lengths_equals_one_by_one(run, thought_sampling, do_sample):
    sampling = Sampling(num_return_sequences=2, max_new_tokens=9, do_sample=do_sample, repetition_penalty=1.2)
    together = generate(run, PROMPTS, sampling, thought_sampling)
    assert together == generate(run, PROMPTS, sampling, thought_sampling, batch_size=1)
    assert together[:4] == generate(run, PROMPTS[:2], sampling, thought_sampling, batch_size=3)
    assert len(set(together)) > 4


def uncached(run, prompt, z, count):
    """Greedy tokens from whole forward passes."""
    ids = [run.start_token, *prompt]
    for _ in range(count):
        hidden = run.model.decoder(run.model.decoder.stem(torch.tensor([ids])), z)
        ids.append(int((hidden[0, -1] @ run.model.decoder.embedding.weight.T).argmax()))
    return ids[1 + len(prompt) :]


def test_greedy_text_equals_whole_forward_passes_in_float32(tiny_run, written):
    run = tiny_run()
    run.model.float()
    torch.set_default_dtype(torch.float32)
    generate(run, PROMPTS, Sampling(do_sample=False, max_new_tokens=12))
    torch.set_default_dtype(torch.float64)
    ((rows, z, found),) = written
    assert max(map(len, rows)) > run.model.decoder.window
    for index, (row, tokens) in enumerate(zip(rows, found, strict=True)):
        expected = uncached(run, row, z[index : index + 1], len(tokens))
        assert tokens == expected
        assert tokens


def fitted(monkeypatch):
    """The batches that q is fitted to from now on."""
    batches, infer_local = [], thoughts.infer_local

    def spy(model, guide, batch, *rest, **options):
        batches.append(batch)
        return infer_local(model, guide, batch, *rest, **options)

    monkeypatch.setattr(thoughts, "infer_local", spy)
    return batches


def test_nothing_but_the_prompt_is_seen(run, monkeypatch):
    batches = fitted(monkeypatch)
    generate(run, PROMPT, Sampling(max_new_tokens=5, num_return_sequences=4))
    (batch,) = batches  # one fit for four texts
    assert batch.targets_BT.tolist() == [encode_prompt(run.tokenizer, PROMPT)]
    assert batch.mask_BT.all()


def test_q_is_fitted_again_to_all_that_is_written(run, monkeypatch):
    batches = fitted(monkeypatch)
    (text,) = generate(run, PROMPT, Sampling(max_new_tokens=7), ThoughtSampling(refit_every=3))
    prompt = encode_prompt(run.tokenizer, PROMPT)
    assert [int(batch.tokens_B) for batch in batches] == [len(prompt) + n for n in (0, 3, 6)]
    assert text.startswith(decode(run, [batches[-1].targets_BT[0].tolist()[len(prompt) :]])[0])


def test_without_a_prompt_z_comes_from_the_prior(run, written):
    generate(run, [""] * 500, Sampling(max_new_tokens=1), batch_size=500)
    ((_, z, _),) = written
    assert abs(z.mean()) < 4 / z.numel() ** 0.5  # four standard errors
    assert abs(z.var() - 1) < 4 * (2 / z.numel()) ** 0.5


def test_candidates_come_from_the_posterior(run):
    """q left at the prior, 50 candidates: the mean of z is that of the posterior that importance weights give."""
    prompt, still = encode_prompt(run.tokenizer, PROMPTS[2]), LocalInference(steps=0)
    keys = prompt_keys(run, [prompt], 0)
    sampler = ThoughtSampler(run, [prompt], keys, ThoughtSampling(candidates=50, inference=still), copies=100)
    found = sampler.sample()
    batch = batch_of_rows([prompt], run.start_token, run.length)
    drawn = draw_thoughts(run, batch, sampler.state.select(torch.tensor([0])), 10_000)
    weight = drawn.log_weight_B[:, 0].softmax(0)
    expected = (weight[:, None] * drawn.z_BLKD[:, 0].flatten(1)).sum(0)
    error = (found.flatten(1).mean(0) - expected) / (found.flatten(1).std(0) / 100**0.5)
    assert error.abs().max() < 4.5  # 48 coordinates
    assert expected.norm() > 0.3  # the prior's own mean is 0


def test_it_stops_at_the_end_and_at_the_length(run, written):
    generate(run, PROMPT, Sampling(max_new_tokens=500, num_return_sequences=20))
    ((rows, _, found),) = written
    assert max(map(len, found)) == 24 - len(rows[0])
    assert not [tokens for tokens in found if run.start_token in tokens]
    generate(run, PROMPT, Sampling(max_new_tokens=5, num_return_sequences=3))
    assert max(map(len, written[-1][-1])) == 5


def test_a_text_ends_behind_a_stop_string(run):
    free = generate(run, PROMPT, Sampling(max_new_tokens=15), seed=2)[0]
    stop = free[4:6]
    (text,) = generate(run, PROMPT, Sampling(max_new_tokens=15, stop_strings=("never", stop)), seed=2)
    assert stop in text
    assert free.startswith(text)
    assert len(text) <= free.index(stop) + 2 + 8  # what else the last token holds


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.binary(max_size=12), max_size=3))
def test_no_half_characters(rows):
    tokenizer = train_tokenizer(["naïve 😀 text"], 262)
    bytes_V = token_texts(tokenizer)
    token_of = {text: token for token, text in enumerate(bytes_V) if len(text) == 1}
    for row in rows:
        tokens, decoder = [token_of[bytes([byte])] for byte in row], TextDecoder(bytes_V)
        assert "".join(decoder.push([token]) for token in tokens) == TextDecoder(bytes_V).push(tokens)
        assert TextDecoder(bytes_V).push(tokens) == row.decode(errors="ignore")


def test_what_is_streamed_is_what_is_returned(run, capsys):
    for prompt in PROMPTS:
        (text,) = generate(run, prompt, Sampling(max_new_tokens=20), streamer=TextStreamer(run.tokenizer), seed=4)
        assert capsys.readouterr().out == text


def test_interpolation_begins_and_ends_at_the_texts(run, written):
    texts = interpolate(run, (PROMPT, PROMPTS[2]), 3, Sampling(max_new_tokens=6))
    ((_, z, _),) = written
    torch.testing.assert_close(z[1], (z[0] + z[2]) / 2**0.5)
    assert len(texts) == 3
    assert texts != [texts[0]] * 3


def test_layers_left_out_do_not_attend_to_thoughts(tiny_run, written):
    run = tiny_run()
    generate(run, PROMPT, Sampling(max_new_tokens=4), ThoughtSampling(layers=(2,)))
    ((rows, z, _),) = written
    assert z[0, 0].eq(0).all()
    assert z[0, 1].ne(0).all()
    stem = run.model.decoder.stem(torch.tensor(rows))
    torch.testing.assert_close(run.model.decoder(stem, torch.zeros_like(z)), run.model.decoder(stem, None))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("length is 24: shorten it", lambda run: generate(run, PROMPT * 20)),
        ("one at a time", lambda run: generate(run, PROMPTS, streamer=TextStreamer(run.tokenizer))),
        ("at least 2 texts", lambda run: interpolate(run, (PROMPT, PROMPT), 1)),
        (
            "no layer 3: the layers with thoughts are counted from 1 to 2",
            lambda run: generate(run, PROMPT, thought_sampling=ThoughtSampling(layers=(3,))),
        ),
        ("candidates must be at least 1", lambda run: ThoughtSampling(candidates=0)),
        ("refit_every", lambda run: ThoughtSampling(refit_every=-1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(run, message, call):
    with pytest.raises(UsageError, match=message):
        call(run)


def test_layers_are_counted_among_those_with_thoughts(tiny_run):
    with pytest.raises(UsageError, match="no layer 2: the layers with thoughts are counted from 1 to 1"):
        generate(tiny_run(thought_layers=[2]), PROMPT, thought_sampling=ThoughtSampling(layers=(2,)))
