"""Incremental decoding with the cache equals decoding the whole text, at a constant cost per token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.models.decoder import Decoder


def make(window=4, heads=2, **changes):
    torch.manual_seed(0)
    options = {"vocabulary": 11, "layers": 3, "width": 8, "thoughts": 3, "length": 40}
    return Decoder(heads=heads, window=window, **options | changes).requires_grad_(False)


def without_cache(decoder, tokens_BT, z_BLKD):
    return decoder(decoder.stem(tokens_BT), z_BLKD)


@settings(max_examples=30, deadline=None)
@given(
    window=st.integers(1, 7),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    changes=st.sampled_from(
        [
            *({}, {"kv_heads": 1}, {"thoughts": 0}, {"thought_width": 4}, {"position_embeddings": True}),
            *({"thought_keys": "learned", "kv_heads": 1}, {"thoughts": 0, "constant_thoughts": 3}),
        ]
    ),
)
def test_decoding_in_pieces_equals_decoding_the_whole_text(window, pieces, changes):
    decoder = make(window, **changes)
    tokens, z = torch.randint(11, (2, sum(pieces))), torch.randn(2, *decoder.thought_shape)
    whole, cache, end = without_cache(decoder, tokens, z), decoder.init_cache(z), 0
    for piece in tokens.split(pieces, 1):
        end += piece.shape[1]
        torch.testing.assert_close(decoder.decode_step(piece, cache), whole[:, end - 1], rtol=0, atol=1e-6)
    assert cache.read_B.tolist() == [end, end]


@settings(max_examples=30, deadline=None)
@given(window=st.integers(1, 7), lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4), more=st.integers(1, 9))
def test_rows_of_different_lengths_are_independent(window, lengths, more):
    decoder, rows = make(window), len(lengths)
    prompt, z = torch.randint(11, (rows, max(lengths))), torch.randn(rows, *decoder.thought_shape)
    cache, following = decoder.init_cache(z), torch.randint(11, (rows, more))
    hidden = [decoder.decode_step(prompt, cache, torch.tensor(lengths))]
    hidden += [decoder.decode_step(token, cache) for token in following.split(1, 1)]
    for row, length in enumerate(lengths):
        alone = torch.cat([prompt[row, :length], following[row]])[None]
        expected = without_cache(decoder, alone, z[row, None])[0, length - 1 :]
        torch.testing.assert_close(torch.stack(hidden)[:, row], expected, rtol=0, atol=1e-6)


def test_a_selection_of_rows_is_an_independent_copy():
    decoder = make()
    tokens, z = torch.randint(11, (3, 6)), torch.randn(3, *decoder.thought_shape)
    cache, index = decoder.init_cache(z), torch.tensor([2, 0, 2])
    decoder.decode_step(tokens, cache, torch.tensor([6, 2, 5]))
    before, chosen, token = cache.read_B.clone(), cache.select(index), torch.tensor([[1], [2], [1]])
    first, _, again = decoder.decode_step(token, chosen)
    assert torch.equal(first, again)
    assert torch.equal(cache.read_B, before)
    torch.testing.assert_close(decoder.decode_step(token, cache)[2], first)


def greedy(decoder, prompt, z, cached, steps=60):
    tokens, cache, new = prompt, decoder.init_cache(z), prompt
    for _ in range(steps):
        hidden = decoder.decode_step(new, cache) if cached else without_cache(decoder, tokens, z)[:, -1]
        new = (hidden @ decoder.embedding.weight.T).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], 1)
    return tokens


@pytest.mark.parametrize("prompt", [1, 5, 30])
def test_greedy_texts_are_identical_in_single_precision(prompt):
    decoder = make(window=8, width=32, heads=4, vocabulary=300, length=100).float()
    decoder.embedding.weight.mul_(0.1)  # otherwise every token would be followed by itself
    z, start = torch.randn(4, *decoder.thought_shape, dtype=torch.float32), torch.randint(300, (4, prompt))
    text = greedy(decoder, start, z, cached=True)
    assert torch.equal(text, greedy(decoder, start, z, cached=False))
    assert len(text.unique()) > 50


def test_a_token_costs_the_same_at_every_position():
    decoder = make()
    cache, costs = decoder.init_cache(torch.randn(2, *decoder.thought_shape)), []
    for _ in range(20):
        with FlopCounterMode(display=False) as counter:
            decoder.decode_step(torch.ones(2, 1, dtype=torch.long), cache)
        costs.append(counter.get_total_flops())
    assert len(set(costs)) == 1


def test_under_autocast_the_cache_is_in_half_precision():
    decoder = make(window=4, width=32, heads=4).float()
    tokens, z = torch.randint(11, (2, 9)), torch.randn(2, *decoder.thought_shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cache = decoder.init_cache(z)
        hidden = decoder.decode_step(tokens, cache)
    assert {x.dtype for ring in cache.rings for x in ring} == {torch.bfloat16}
    torch.testing.assert_close(hidden.float(), without_cache(decoder, tokens, z)[:, -1], rtol=0.05, atol=0.1)
