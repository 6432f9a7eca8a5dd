"""The fused cross-entropy against torch's on the whole logits: values, gradients and memory."""

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.local import init, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.nn import cross_entropy_autograd as autograd
from ltm_pyro.nn.cross_entropy import LateGradient, token_nats
from ltm_pyro.nn.cross_entropy_autograd import Tile, kernel

B, T, D, V = 3, 7, 16, 50


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along both axes; the last ones are not full."""
    monkeypatch.setitem(autograd.TILES, "cpu", Tile(8, 12))


def leaves(dtype=torch.float64, scale=1.0):
    hidden, embedding = torch.randn(B, T, D, dtype=dtype), scale * torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), embedding.requires_grad_(), torch.randint(V, (B, T))


def dense(hidden, embedding, value):
    logits = F.linear(hidden.double(), embedding.double())
    return F.cross_entropy(logits.flatten(0, -2), value.flatten(), reduction="none").view(value.shape)


def error(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


LIMITS = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]  # relative error


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize("wanted", [[0], [1], [0, 1]])
@pytest.mark.parametrize(("columns", "multiple"), [(12, 1), (16, 8)])  # as on a CPU, and padded as on an accelerator
def test_values_and_gradients_equal_those_of_whole_logits(columns, multiple, dtype, limit, wanted, monkeypatch):
    monkeypatch.setitem(autograd.TILES, "cpu", Tile(8, columns, multiple))
    hidden, embedding, value = leaves()
    weight = torch.randn(B, T)
    inputs = [x.detach().to(dtype).requires_grad_(i in wanted) for i, x in enumerate((hidden, embedding))]
    ours, truth = token_nats(*inputs, value), dense(hidden, embedding, value)
    assert ours.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert error(ours, truth) < limit
    actual = torch.autograd.grad((ours * weight).sum(), [inputs[i] for i in wanted])
    expected = torch.autograd.grad((truth * weight).sum(), [(hidden, embedding)[i] for i in wanted])
    assert max(map(error, actual, expected)) < limit


@pytest.mark.parametrize("wanted", [[0], [0, 1]])
def test_autocast_affects_matrix_products_only(wanted):
    hidden, embedding, value = leaves(torch.float32)
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((hidden, embedding))]
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_nats(*inputs, value)
    assert ours.dtype == torch.float32
    actual = torch.autograd.grad(ours.sum(), [inputs[i] for i in wanted])
    expected = torch.autograd.grad(dense(hidden, embedding, value).sum(), [(hidden, embedding)[i] for i in wanted])
    assert {x.dtype for x in actual} == {torch.float32}
    assert error(ours, dense(hidden, embedding, value)) < 2e-2
    assert max(map(error, actual, expected)) < 2e-2


def test_large_logits_give_finite_results():
    hidden, embedding, value = leaves(scale=1e4)
    nats = token_nats(hidden, embedding.detach(), value)
    torch.testing.assert_close(nats, dense(hidden, embedding, value))
    assert torch.autograd.grad(nats.sum(), hidden)[0].isfinite().all()


def test_leading_particle_axes():
    hidden, embedding, value = leaves()
    many = torch.stack([hidden, 2 * hidden])
    torch.testing.assert_close(token_nats(many, embedding, value)[1], dense(2 * hidden, embedding, value))


def test_there_is_no_second_derivative():
    hidden, embedding, value = leaves()
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(token_nats(hidden, embedding, value).sum(), hidden, create_graph=True)


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of any operator."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
def test_a_training_step_never_has_the_logits_of_a_batch_in_memory(tiny_model, tiny_batch, slow_gradient):
    model, batch = tiny_model(vocabulary=300), tiny_batch(size=4, length=16)
    with Largest() as largest:
        inference = LocalInference(steps=2, slow_gradient=slow_gradient)
        training_loss(model, MeanField(model), batch, inference).loss.backward()
    assert largest.elements < batch.inputs_BT.numel() * 300 / 2
    assert model.decoder.embedding.weight.grad.abs().sum() > 0


def test_gradients_are_computed_only_if_needed(tiny_model, tiny_batch, monkeypatch):
    model, batch, requested = tiny_model(), tiny_batch(), []
    original = autograd._logsumexp_and_mean
    monkeypatch.setattr(
        autograd, "_logsumexp_and_mean", lambda h, e, needed, x: requested.append(needed) or original(h, e, needed, x)
    )
    guide = MeanField(model)
    training_loss(model, guide, batch, LocalInference(steps=2, slow_gradient="last"))
    with torch.no_grad():
        elbo_terms(model, guide, batch, init(model, guide, batch, LocalInference()).parameters)
    assert requested == [True, True, True, False]  # two fast steps, the slow step, a score


def test_the_embeddings_gradient_is_computed_after_the_decoders_backward(tiny_model, tiny_batch, monkeypatch):
    model, batch, order = tiny_model(), tiny_batch(), []
    original = autograd._embedding_gradient
    monkeypatch.setattr(autograd, "_embedding_gradient", lambda *a: order.append("embedding") or original(*a))
    for name, parameter in model.decoder.blocks.named_parameters():
        parameter.register_hook(lambda _, name=name: order.append(name))
    guide, inference = MeanField(model), LocalInference(steps=2, slow_gradient="last")
    local = init(model, guide, batch, inference).parameters
    elbo_terms(model, guide, model.prepare(batch), local).elbo_B.sum().backward()
    stem = {"0.norm_self.weight", "0.self_attention.query_key_value.weight", "0.self_attention.output.weight"}
    assert (
        set(order[order.index("embedding") :]) == {"embedding"} | stem
    )  # the parts of the decoder that run before `late` is created


@pytest.mark.parametrize("times", [1, 2])
def test_a_late_gradient_serves_one_call(times):
    hidden, embedding, value = leaves()
    late = LateGradient.of(embedding, value.shape)
    texts = [(hidden, value), (2 * hidden, value.flip(0))][:times]
    ours = sum(token_nats(x, embedding, y, late).square().sum() for x, y in texts)
    truth = sum(dense(x, embedding, y).square().sum() for x, y in texts)
    for _ in range(2):  # the backward pass can run twice
        actual = torch.autograd.grad(ours, [hidden, embedding], retain_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(truth, [hidden, embedding], retain_graph=True))


def test_a_late_gradient_of_another_shape_is_not_used():
    hidden, embedding, value = leaves()
    ours = token_nats(hidden, embedding, value, LateGradient.of(embedding, (B, T + 1)))
    expected = torch.autograd.grad(dense(hidden, embedding, value).sum(), embedding)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), embedding), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_same(dtype, monkeypatch):
    """The kernels of an accelerator, compiled for a CPU: large padded tiles, for batches of two sizes."""
    inputs = leaves(dtype)
    cases = [(*inputs[:2], inputs[2]), (inputs[0][:2, :3], inputs[1], inputs[2][:2, :3])]

    def nats_and_gradients(hidden, embedding, value):
        nats = token_nats(hidden, embedding, value)
        return nats, *torch.autograd.grad(nats.sum(), (hidden, embedding))

    expected = [nats_and_gradients(*case) for case in cases]
    compiled = {
        f: kernel(f, "not a cpu")
        for f in (autograd._online_softmax, autograd._nats_and_gradient, autograd._logits_gradient)
    }
    monkeypatch.setattr(autograd, "TILES", {})
    monkeypatch.setattr(autograd, "LARGE_TILE", Tile(8, 1000, 64))
    monkeypatch.setattr(autograd, "kernel", lambda function, device: compiled[function])
    for case, before in zip(cases, expected, strict=True):
        for ours, theirs in zip(nats_and_gradients(*case), before, strict=True):
            assert error(ours, theirs) < (1e-5 if dtype == torch.float32 else 2e-2)
    pyro.enable_validation(True)  # because torch.compile turns it off


def test_in_half_precision_no_token_has_less_than_0_nats():
    """The chosen token's logit is rounded as those in the sum are."""
    hidden_BTD, embedding_VD = (30 * torch.randn(4, 50, 16)).float(), torch.randn(2100, 16).float()
    value_BT = (hidden_BTD @ embedding_VD.T).argmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats_BT = token_nats(hidden_BTD, embedding_VD, value_BT)
    logits_BTV = (hidden_BTD.bfloat16() @ embedding_VD.bfloat16().T).double()
    expected_N = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), value_BT.flatten(), reduction="none")
    torch.testing.assert_close(nats_BT.flatten(), expected_N.float(), rtol=1e-5, atol=1e-4)
    assert (nats_BT >= 0).all()
