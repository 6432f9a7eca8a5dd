"""The hand-written backward pass of RMSNorm equals autograd's, also to second order."""

import pytest
import torch

from ltm_pyro.nn.rms_norm import RMSNorm, rms_norm


def sample(dtype=torch.float64):
    torch.manual_seed(0)
    norm, x, grad = RMSNorm(8).to(dtype), torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, x.requires_grad_(), grad


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_value_and_gradients_equal_those_of_the_formula(dtype, limit):
    norm, x, grad = sample(dtype)
    ours, theirs = norm(x), rms_norm(x, norm.weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * 10)
    actual, expected = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (ours, theirs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=limit * 10)


def test_it_equals_torchs_rms_norm():
    norm, x, _ = sample()
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight), rtol=0, atol=1e-14)


def test_gradients_are_correct_to_second_order():
    norm, x, _ = sample()
    assert torch.autograd.gradcheck(lambda a, w: torch.func.functional_call(norm, {"weight": w}, a), (x, norm.weight))
    assert torch.autograd.gradgradcheck(
        lambda a, w: torch.func.functional_call(norm, {"weight": w}, a), (x, norm.weight)
    )


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_a_gradient_is_computed_only_for_what_requires_it(frozen):
    norm, x, grad = sample()
    constant, variable = (x, norm.weight) if frozen == "input" else (norm.weight, x)
    constant.requires_grad_(False)
    (actual,) = torch.autograd.grad(norm(x), variable, grad)
    (expected,) = torch.autograd.grad(rms_norm(x, norm.weight), variable, grad)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_the_output_has_the_dtype_of_the_next_matrix_product():
    norm, x, _ = sample(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms_norm(x, norm.weight).bfloat16(), rtol=1e-2, atol=1e-2)
