"""The average gradient over a trajectory is correct although gradients are summed in place."""

import pytest
import torch
from torch import nn

from ltm_pyro.guides import MeanField
from ltm_pyro.inference.trajectory_gradient import TrajectoryGradient

GUIDE = MeanField.__new__(MeanField)  # a guide without global parameters


class SumModel(nn.Module):
    """SumModel parameters in a sum, so that autograd returns one gradient tensor for both; the third is unused."""

    sample_prior = prepare = observation = observed = lambda self: None  # only to satisfy the protocol `Model`

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = (nn.Parameter(torch.randn(3)) for _ in range(3))

    def forward(self):
        return (self.a + self.b).sum()


@pytest.mark.parametrize("points", [1, 3])
def test_a_gradient_tensor_of_two_parameters_is_averaged_for_each_of_them(points):
    model = SumModel()
    average = TrajectoryGradient(model, GUIDE, None, None)
    for point in range(points):
        loss = (1 + point) * model()
        average.add(torch.autograd.grad(loss, average.tensors, allow_unused=True))
    (2 * average.loss(loss.detach())).backward()
    expected = torch.full((3,), 2 * sum(range(1, points + 1)) / points)
    torch.testing.assert_close(model.a.grad, expected)
    torch.testing.assert_close(model.b.grad, expected)
    assert model.unused.grad is None


def test_a_sparse_gradient_from_the_stem_becomes_dense():
    model, rows = SumModel(), nn.Embedding(4, 3)
    model.rows = rows
    stem = nn.functional.embedding(torch.tensor([1, 1]), rows.weight, sparse=True)
    leaf = stem.detach()
    average = TrajectoryGradient(model, GUIDE, leaf, stem)
    average.add(torch.autograd.grad((leaf * model.a).sum() + model(), average.tensors, allow_unused=True))
    average.loss(torch.zeros(())).backward()
    torch.testing.assert_close(rows.weight.grad, torch.stack([0 * model.a, 2 * model.a, 0 * model.a, 0 * model.a]))


def test_without_trainable_parameters_the_loss_is_the_value():
    model = SumModel().requires_grad_(False)
    average = TrajectoryGradient(model, GUIDE, None, None)
    average.add(())
    assert average.loss(torch.ones(())).item() == 1
