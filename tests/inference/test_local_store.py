"""Persistent local parameters: stored by sequence id, in memory and on disk."""

import pytest
import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import infer_local, init
from ltm_pyro.inference.local_store import LocalStore
from ltm_pyro.inference.state import LocalInference


@pytest.fixture
def problem(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    inference = LocalInference(steps=2)
    return model, MeanField(model), batch, inference, init(model, MeanField(model), batch, inference)


@pytest.mark.parametrize("disk", [False, True])
def test_a_stored_state_is_returned_by_id(problem, tmp_path, disk):
    model, guide, batch, inference, default = problem
    store = LocalStore(10, tmp_path / "local" if disk else None)
    state, _ = infer_local(model, guide, batch, inference, store.get(torch.tensor([7, 2, 4]), default))
    store.put(torch.tensor([7, 2, 4]), state)

    stored = store.get(torch.tensor([2, 9, 7]), default)
    torch.testing.assert_close(stored.parameters["z_loc"][0], state.parameters["z_loc"][1])
    torch.testing.assert_close(stored.moments["z_loc"]["mean"][2], state.moments["z_loc"]["mean"][0])
    torch.testing.assert_close(stored.parameters["z_log_var"][1], default.parameters["z_log_var"][1])
    assert stored.steps_B.tolist() == [2, 0, 2]


@pytest.mark.parametrize("disk", [False, True])
def test_a_restored_store_has_the_same_states(problem, tmp_path, disk):
    model, guide, batch, inference, default = problem
    directory = tmp_path / "local" if disk else None
    store, ids_B = LocalStore(5, directory), torch.tensor([0, 3, 1])
    state, _ = infer_local(model, guide, batch, inference)
    store.put(ids_B, state)
    restored = LocalStore(5, directory)
    restored.load_state_dict(store.state_dict())
    torch.testing.assert_close(restored.get(ids_B, default).parameters, state.parameters)


def test_files_of_another_size_are_refused(problem, tmp_path):
    *_, default = problem
    LocalStore(5, tmp_path).put(torch.tensor([0, 1, 2]), default)
    with pytest.raises(UsageError, match=r"has shape \(5,\).*need \(6,\)"):
        LocalStore(6, tmp_path).get(torch.tensor([0, 1, 2]), default)
    with pytest.raises(UsageError, match="is a file, and local parameters need a folder"):
        LocalStore(5, next(tmp_path.iterdir()))


def test_a_non_finite_state_is_not_stored(problem):
    *_, default = problem
    store, ids_B = LocalStore(5), torch.tensor([0, 3, 1])
    broken = default.parameters["z_loc"].clone()
    broken[1] = torch.nan
    state = default._replace(parameters={**default.parameters, "z_loc": broken}, steps_B=torch.full((3,), 4))
    store.put(ids_B, state)
    assert store.get(ids_B, default).steps_B.tolist() == [4, 0, 4]
