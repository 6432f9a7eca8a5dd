"""Fast optimisers against torch's."""

import pytest
import torch

from ltm_pyro.inference.optimizers import OPTIMIZERS, Groups


@pytest.mark.parametrize(
    ("name", "reference", "options"),
    [
        ("adam", torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95)}),
        ("adamw", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
        ("sgd", torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_a_step_is_torchs(name, reference, options):
    theirs = torch.randn(3, 2, requires_grad=True)
    ours, optimizer = theirs.detach().clone(), OPTIMIZERS[name]
    moments, torchs = optimizer.init(ours), reference([theirs], **options)
    for update in optimizer.updates(torch.arange(1.0, 6.0)[:, None].expand(5, 3), **options):
        gradient = torch.randn(3, 2)
        theirs.grad = gradient
        torchs.step()
        ours, moments = update(ours, gradient, moments, 1.0)
        torch.testing.assert_close(ours, theirs.detach())


def test_sequences_count_their_steps_alone():
    optimizer, x = OPTIMIZERS["adam"], torch.zeros(2, 4)
    moments = {"mean": torch.zeros(2, 4), "square": torch.zeros(2, 4)}
    gradient = torch.ones(2, 4)
    (update,) = optimizer.updates(torch.tensor([[1.0, 50.0]]), lr=0.2)
    moved, _ = update(x, gradient, moments, 0.5)
    torch.testing.assert_close(moved[0], torch.full((4,), -0.1))
    torch.testing.assert_close(
        moved[1].abs(), torch.full((4,), 0.1 * 0.1 / (1 - 0.9**50) / (0.001 / (1 - 0.999**50)) ** 0.5)
    )


def test_equal_arguments_share_a_tensor():
    like = {"a": torch.randn(3, 2, 2), "b": torch.randn(3), "c": torch.randn(3, 5)}
    groups = Groups(like, lambda name: {"lr": 0.1 if name == "b" else 0.2})
    joined = groups.join(like)
    assert sorted(x.shape for x in joined.values()) == [(3, 1), (3, 9)]
    back = groups.split(joined)
    assert list(back) == list(like)
    assert all(torch.equal(back[name], x) for name, x in like.items())
