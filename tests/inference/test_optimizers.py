"""The optimisers of local parameters against torch's."""

import pytest
import torch

from ltm_pyro.inference.optimizers import OPTIMIZERS
from ltm_pyro.inference.state import LocalState


@pytest.mark.parametrize(
    ("name", "reference", "options"),
    [
        ("adam", torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95)}),
        ("adamw", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
        ("sgd", torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_a_step_equals_torchs(name, reference, options):
    theirs = torch.randn(3, 2, requires_grad=True)
    optimizer, torchs = OPTIMIZERS[name], reference([theirs], **options)
    parameters = {"x": theirs.detach().clone()}
    state = LocalState(parameters, optimizer.init(parameters), torch.zeros(3, dtype=torch.long))
    for update in optimizer.updates(state, [1.0] * 5, lambda _: options):
        theirs.grad = torch.randn(3, 2)
        torchs.step()
        state = update(state, {"x": theirs.grad})
        torch.testing.assert_close(state.parameters["x"], theirs.detach())
    assert state.steps_B.tolist() == [5, 5, 5]


def test_every_sequence_has_its_own_step_count():
    optimizer, parameters = OPTIMIZERS["adam"], {"x": torch.zeros(2, 4)}
    state = LocalState(parameters, optimizer.init(parameters), torch.tensor([0, 49]))
    (update,) = optimizer.updates(state, [0.5], lambda _: {"lr": 0.2})
    state = update(state, {"x": torch.ones(2, 4)})
    torch.testing.assert_close(state.parameters["x"][0], torch.full((4,), -0.1))
    torch.testing.assert_close(
        state.parameters["x"][1].abs(),
        torch.full((4,), 0.1 * 0.1 / (1 - 0.9**50) / (0.001 / (1 - 0.999**50)) ** 0.5),
    )
    assert state.steps_B.tolist() == [1, 50]


def test_parameters_with_equal_arguments_share_an_update(monkeypatch):
    """One update per set of arguments, for parameters of any shape, with the same result as separate updates."""
    optimizer, shapes = OPTIMIZERS["adam"], []
    parameters = {"a": torch.randn(3, 2, 2), "b": torch.randn(3), "c": torch.randn(3, 5)}
    gradients = {name: torch.randn_like(x) for name, x in parameters.items()}

    def rates(name):
        return {"lr": 0.1 if name == "local.b" else 0.2}

    def recorded(*arguments, **options):
        for update in OPTIMIZERS["adam"].tensor_updates(*arguments, **options):
            yield lambda x, *rest, update=update: shapes.append(tuple(x.shape)) or update(x, *rest)

    def two_steps(optimizer, names):
        selected = {name: parameters[name] for name in names}
        state = LocalState(selected, optimizer.init(selected), torch.zeros(3, dtype=torch.long))
        for update in optimizer.updates(state, [1.0, 0.5], rates):
            state = update(state, {name: gradients[name] for name in names})
        return state

    together = two_steps(optimizer._replace(tensor_updates=recorded), parameters)
    assert shapes == [(3, 9), (3, 1)] * 2
    assert list(together.parameters) == list(parameters)
    for name in parameters:
        alone = two_steps(optimizer, [name])
        torch.testing.assert_close(together.parameters[name], alone.parameters[name])
        torch.testing.assert_close(together.moments[name], alone.moments[name])
