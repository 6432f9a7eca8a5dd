"""The next token: Hugging Face's filters in their order, and draws with the right probabilities."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.errors import UsageError
from ltm_pyro.text.sampling import Sampling, choose, filter_logits, penalise


def by_their_warpers(logits, sampling):
    """What the warpers of transformers make of logits, in the order of its `generate`."""
    warpers = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    top_k, top_p, min_p = sampling.filters
    chain = [warpers.TemperatureLogitsWarper(sampling.temperature)]
    chain += [warpers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [warpers.MinPLogitsWarper(min_p)] if min_p else []
    for warper in chain:
        logits = warper(None, logits)
    return logits


def random_logits(seed, levels, vocabulary):
    """Normal logits, or of only so many levels, so that many tokens are as likely."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, dtype=torch.float32, generator=generator) * 2
    return (logits * levels / 4).round() * 4 / levels if levels else logits


@settings(max_examples=300, deadline=None)
@given(
    top_k=st.sampled_from([0, 1, 2, 5, 40, 300]),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.0, 0.5, 0.25, 0.9, 1 - 1e-7]), st.floats(0.01, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 0.9)),
    temperature=st.sampled_from([1.0, 0.5, 2.0, 0.7]),
    seed=st.integers(0, 99),
    levels=st.sampled_from([0, 1, 2, 8]),
    vocabulary=st.sampled_from([1, 2, 9, 257]),
)
def test_the_tokens_kept_are_those_of_hugging_face(top_k, top_p, min_p, temperature, seed, levels, vocabulary):
    logits = random_logits(seed, levels, vocabulary)
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    ours, theirs = filter_logits(logits, sampling), by_their_warpers(logits, sampling)
    assert torch.equal(ours, theirs)


def test_top_p_of_one_keeps_every_token():
    logits = torch.linspace(-30, 30, 50_257, dtype=torch.float32)[None]  # whose sum is 1 long before the last of them
    assert filter_logits(logits, Sampling(top_p=1.0)).isfinite().all()
    assert not filter_logits(logits, Sampling(top_p=1 - 1e-6)).isfinite().all()


def test_of_two_equal_halves_one_is_top_p_of_a_half():
    assert filter_logits(torch.zeros(1, 4), Sampling(top_p=0.5)).isfinite().sum() == 2
    assert filter_logits(torch.zeros(1, 4), Sampling(top_p=0.51)).isfinite().sum() == 3


def test_none_is_the_default_and_one_stop_string_is_one():
    unset = ("top_k", "top_p", "min_p", "stop_strings")
    assert Sampling(**dict.fromkeys(unset)) == Sampling()
    assert Sampling(do_sample=False, top_k=None, top_p=None) == Sampling(do_sample=False)
    assert Sampling(stop_strings="abc") == Sampling(stop_strings=["abc"]) == Sampling(stop_strings=("abc",))


def test_temperature_divides():
    logits = torch.randn(2, 5)
    torch.testing.assert_close(filter_logits(logits, Sampling(temperature=0.5)), logits * 2)


def test_tokens_are_drawn_with_their_probabilities():
    logits, draws = torch.randn(7), 20_000
    chosen = choose(logits.expand(draws, -1), torch.rand(draws), Sampling(top_k=5))
    p = filter_logits(logits[None], Sampling(top_k=5)).softmax(-1)[0]
    error = (chosen.bincount(minlength=7) / draws - p) / (p * (1 - p) / draws).sqrt().clamp(min=1e-12)
    assert error.abs().max() < 4  # standard errors


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_no_draw_falls_outside_what_is_kept(uniform):
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf]])
    assert choose(logits, torch.tensor([uniform]), Sampling()).item() == (1 if uniform == 0 else 2)


def test_tokens_seen_become_less_likely():
    logits, seen = torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": 1e-39},  # logits would overflow
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
        {"num_return_sequences": 0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-39},
        {"stop_strings": ("",)},
        {"stop_strings": ""},
        {"top_k": True},
        {"do_sample": False, "top_k": 5},
        {"do_sample": False, "temperature": 0.7},
    ],
    ids=str,
)
def test_settings_without_sense(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


WRONG_TYPES = """
from ltm_pyro.errors import UsageError
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import score, score_continuations

wrong = [{"do_sample": "no"}, {"top_k": "5"}, {"top_k": 5.5}, {"temperature": "1"}, {"max_new_tokens": 5.5}]
calls = [lambda x=x: Sampling(**x) for x in [*wrong, {"stop_strings": [1]}]]
calls += [lambda: score(None, "the old"), lambda: score(None, ["the", 7]), lambda: score_continuations(None, ["ab"])]
calls += [lambda: score_continuations(None, [("a", "b"), ("a", "b", "c")])]
for call in calls:
    try:
        call()
    except UsageError as error:
        print(error)
"""


def test_wrong_types_are_told_in_a_sentence():
    """In a process of its own, because a type checker sees every call in the tests."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "do_sample must be True or False, got 'no'.",
        "top_k must be a whole number, got '5'.",
        "top_k must be a whole number, got 5.5.",
        "temperature must be a number, got '1'.",
        "max_new_tokens must be a whole number, got 5.5.",
        "stop_strings must be texts, got 1.",
        "A list of texts is scored, got 'the old'.",
        "A list of texts is scored, got 7.",
        "Pair 0 is 'ab', and not a context with its continuation, two texts.",
        "Pair 1 is ('a', 'b', 'c'), and not a context with its continuation, two texts.",
    ], done.stderr
