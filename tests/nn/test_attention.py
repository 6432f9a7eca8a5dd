"""Windowed attention equals dense attention with a band mask, and rotary positions are relative."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.errors import UsageError
from ltm_pyro.nn.attention import (
    BACKENDS,
    KeysValues,
    attend,
    backend,
    block_attention,
    dense_attention,
    window_attention,
    window_mask,
)
from ltm_pyro.nn.layers import CrossAttention, rotary, rotation


def random_qkv(length, seed=0, size=2, heads=2, channels=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, size, heads, length, channels)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_().unbind(0)


def angles(first=0, length=5, channels=4):
    return rotation(torch.arange(first, first + length), channels)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), window=st.integers(1, 45), seed=st.integers(0, 100))
def test_block_attention_equals_dense_attention(length, window, seed):
    q, k, v = random_qkv(length, seed)
    torch.testing.assert_close(block_attention(q, k, v, window), dense_attention(q, k, v, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "window"), [(7, 3), (8, 4), (5, 9)])
def test_the_gradients_of_block_and_dense_attention_are_equal(length, window):
    q, k, v = random_qkv(length)
    weight = torch.randn_like(q)
    ours, theirs = (
        torch.autograd.grad((attention(q, k, v, window) * weight).sum(), (q, k, v))
        for attention in (block_attention, dense_attention)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_window_includes_the_token_itself():
    mask_TT = window_mask(6, 6, 3)
    assert mask_TT.sum(-1).tolist() == [1, 2, 3, 3, 3, 3]
    assert mask_TT[4].tolist() == [False, False, True, True, True, False]
    q, k, v = random_qkv(6)
    torch.testing.assert_close(block_attention(q, k, v, 1), v)


def test_the_mask_of_the_last_queries_is_the_end_of_the_whole_mask():
    assert torch.equal(window_mask(2, 6, 3), window_mask(6, 6, 3)[-2:])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cross_attention_equals_torchs(kv_heads):
    torch.manual_seed(0)
    attention = CrossAttention(width=16, heads=4, kv_heads=kv_heads, thought_width=6).double()
    x, z = torch.randn(2, 7, 16).double(), torch.randn(2, 3, 6).double()
    q = attention.queries(x, angles(length=7))
    k, v = attention.split(attention.key_value(z)).chunk(2, dim=2)
    k, v = KeysValues(rotary(k, angles(length=3)).transpose(1, 2), v.transpose(1, 2)).repeat_heads(4)
    expected = attention.merge(F.scaled_dot_product_attention(q, k, v))
    actual = attention(x, angles(length=7), attention.project_kv(z, angles(length=3)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_with_a_diagonal_mask_attention_returns_the_values():
    q, k, v = random_qkv(4)
    mask_TT = torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, mask_TT), v)


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 500), seed=st.integers(0, 100))
def test_rotary_scores_depend_on_distance_only(shift, seed):
    q, k, _ = (x.transpose(1, 2) for x in random_qkv(5, seed))
    original, shifted = (
        torch.einsum("bihc,bjhc->bhij", rotary(q, angles(m)), rotary(k, angles(m))) for m in (0, shift)
    )
    torch.testing.assert_close(original, shifted, rtol=0, atol=2e-4)  # angles are computed in float32


def test_rotary_keeps_norms_and_does_not_rotate_position_zero():
    q = random_qkv(5)[0].transpose(1, 2)
    torch.testing.assert_close(rotary(q, angles()).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotary(q, angles())[:, 0], q[:, 0])


def test_rotary_without_complex_numbers_is_the_same(monkeypatch):
    q = random_qkv(5)[0].transpose(1, 2)
    complex_product = rotary(q, angles(3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotary(q, angles(3)), complex_product, rtol=0, atol=1e-15)


def test_grouped_heads_share_keys_and_values():
    k, v = KeysValues(*torch.randn(2, 3, 2, 5, 4)).repeat_heads(4)
    for x in (k, v):
        assert x.shape == (3, 4, 5, 4)
        assert torch.equal(x[:, 0], x[:, 1])
        assert torch.equal(x[:, 2], x[:, 3])
        assert not torch.equal(x[:, 1], x[:, 2])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["dense", "sdpa"])
def test_every_dtype_is_close_to_double_precision(name, dtype, limit):
    q, k, v = random_qkv(29, channels=8)
    truth = dense_attention(q, k, v, 5)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    ours = window_attention(*inputs, 5, name)
    expected, actual = torch.autograd.grad(truth.sum(), (q, k, v)), torch.autograd.grad(ours.sum(), inputs)
    for a, b in zip((ours, *actual[1:]), (truth, *expected[1:]), strict=True):  # q's gradient is nearly zero here
        assert ((a.double() - b).norm() / b.norm()).item() < limit


def test_auto_chooses_sdpa_on_a_cpu_and_logs_it_once(caplog):
    backend.cache_clear()
    with caplog.at_level("INFO"):
        assert {backend("auto", "cpu", torch.float32, 8, 4) for _ in range(3)} == {"sdpa"}
    assert [record.message for record in caplog.records] == [
        "attention on cpu in torch.float32 with a window of 4: sdpa"
    ]


@pytest.mark.parametrize(("name", "why"), [("xformers", "Error"), ("nonsense", "none of this name")])
def test_the_error_of_an_unusable_backend_has_the_reason(name, why):
    with pytest.raises(UsageError, match=rf"'{name}' cannot run on cpu .*{why}.*set `attention` to auto"):
        backend(name, "cpu", torch.float32, 8, 4)


def test_a_backend_with_wrong_results_is_refused(monkeypatch):
    monkeypatch.setitem(BACKENDS, "sdpa", lambda q, k, v, window: dense_attention(q, k, v, window + 1))
    backend.cache_clear()
    with pytest.raises(UsageError, match="away from dense attention"):
        backend("sdpa", "cpu", torch.float32, 8, 4)
    backend.cache_clear()
