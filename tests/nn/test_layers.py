"""The norm's own backward pass is its formula's, once and twice."""

import pytest
import torch

from ltm_pyro.nn.rms_norm import RMSNorm, rms_norm


def sample(dtype=torch.float64):
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(8).to(dtype), torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, x.requires_grad_(), grad


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_value_and_gradients_are_the_formulas(dtype, limit):
    norm, x, grad = sample(dtype)
    ours, theirs = norm(x), rms_norm(x, norm.weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * 10)
    found, expected = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=limit * 10)


def test_it_is_torchs_own():
    norm, x, _ = sample()
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight), rtol=0, atol=1e-14)


def test_gradients_are_right_to_second_order():
    norm, x, _ = sample()
    assert torch.autograd.gradcheck(lambda a, w: torch.func.functional_call(norm, {"weight": w}, a), (x, norm.weight))
    assert torch.autograd.gradgradcheck(
        lambda a, w: torch.func.functional_call(norm, {"weight": w}, a), (x, norm.weight)
    )


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    norm, x, grad = sample()
    still, moving = (x, norm.weight) if frozen == "input" else (norm.weight, x)
    still.requires_grad_(False)
    (found,) = torch.autograd.grad(norm(x), moving, grad)
    (expected,) = torch.autograd.grad(rms_norm(x, norm.weight), moving, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_it_hands_on_what_the_next_product_is_computed_in():
    norm, x, _ = sample(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms_norm(x, norm.weight).bfloat16(), rtol=1e-2, atol=1e-2)
