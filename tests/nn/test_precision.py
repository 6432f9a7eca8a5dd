"""Frozen matrices are cast to half precision, and restored exactly."""

import torch

from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import frozen, infer_local
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.nn.precision import matrix_dtype


def test_matrix_products_use_autocasts_dtype():
    x = torch.zeros(1)
    assert matrix_dtype(x) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert matrix_dtype(x) == torch.bfloat16


def test_frozen_matrices_are_cast_once_and_restored(tiny_model):
    model = tiny_model().float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16), frozen(model):
        for name, p in model.named_parameters():
            assert p.dtype == (torch.bfloat16 if p.dim() == 2 else torch.float32), name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == pointers[name]


def test_a_fit_in_half_precision_is_close_to_one_in_single(tiny_model, tiny_batch):
    model, batch = tiny_model(width=32, heads=4).float(), tiny_batch()
    inference, actual = LocalInference(steps=4), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state, info = infer_local(model, MeanField(model), batch, inference)
        actual.append(info.elbo_NB)
        assert {x.dtype for x in state.parameters.values()} <= {torch.float32, torch.float64}
        assert info.kl_NB.dtype != torch.bfloat16
    torch.testing.assert_close(*actual, rtol=0.02, atol=0.1, check_dtype=False)
