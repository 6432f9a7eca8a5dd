"""The next token: Hugging Face's filters in their order, and draws with the right probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.errors import UsageError
from ltm_pyro.text.sampling import Sampling, choose, filter_logits, penalise


def filtered(p, top_k, top_p, min_p):
    """The tokens kept, filter after filter, from the definitions."""
    kept = p.argsort(descending=True).tolist()[: top_k or None]
    total, mass, nucleus = float(p[kept].sum()), 0.0, []
    for token in kept:
        if mass / total >= top_p and nucleus:
            break
        nucleus.append(token)
        mass += float(p[token])
    return {token for token in nucleus if p[token] >= min_p * p[kept[0]]}


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 99),
)
def test_filters_keep_what_their_definitions_keep(top_k, top_p, min_p, temperature, seed):
    logits = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    kept = filter_logits(logits, sampling).isfinite()
    for row in range(2):
        expected = filtered((logits[row] / temperature).softmax(-1), top_k, top_p, min_p)
        assert set(kept[row].nonzero()[:, 0].tolist()) == expected


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
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
        {"num_return_sequences": 0},
        {"repetition_penalty": 0.0},
        {"stop_strings": ("",)},
        {"do_sample": False, "top_k": 5},
        {"do_sample": False, "temperature": 0.7},
    ],
    ids=str,
)
def test_settings_without_sense(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)
