"""Persistent local parameters: kept by sequence id, in memory and on disk."""

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
def test_what_is_kept_comes_back_by_id(problem, tmp_path, disk):
    model, guide, batch, inference, fresh = problem
    store = LocalStore(10, tmp_path / "local" if disk else None)
    state, _ = infer_local(model, guide, batch, inference, store.recall(torch.tensor([7, 2, 4]), fresh))
    store.keep(torch.tensor([7, 2, 4]), state)

    recalled = store.recall(torch.tensor([2, 9, 7]), fresh)
    torch.testing.assert_close(recalled.parameters["z_loc"][0], state.parameters["z_loc"][1])
    torch.testing.assert_close(recalled.moments["z_loc"]["mean"][2], state.moments["z_loc"]["mean"][0])
    torch.testing.assert_close(recalled.parameters["z_log_var"][1], fresh.parameters["z_log_var"][1])
    assert recalled.steps_B.tolist() == [2, 0, 2]


@pytest.mark.parametrize("disk", [False, True])
def test_a_resumed_store_goes_on(problem, tmp_path, disk):
    model, guide, batch, inference, fresh = problem
    directory = tmp_path / "local" if disk else None
    store, ids_B = LocalStore(5, directory), torch.tensor([0, 3, 1])
    state, _ = infer_local(model, guide, batch, inference)
    store.keep(ids_B, state)
    resumed = LocalStore(5, directory)
    resumed.load_state_dict(store.state_dict())
    torch.testing.assert_close(resumed.recall(ids_B, fresh).parameters, state.parameters)


def test_files_of_other_data_are_refused(problem, tmp_path):
    *_, fresh = problem
    LocalStore(5, tmp_path).keep(torch.tensor([0, 1, 2]), fresh)
    with pytest.raises(UsageError, match=r"has shape \(5,\).*need \(6,\)"):
        LocalStore(6, tmp_path).recall(torch.tensor([0, 1, 2]), fresh)
    with pytest.raises(UsageError, match="is a file, and local parameters need a folder"):
        LocalStore(5, next(tmp_path.iterdir()))


def test_a_state_that_is_not_finite_is_not_kept(problem):
    *_, fresh = problem
    store, ids_B = LocalStore(5), torch.tensor([0, 3, 1])
    broken = fresh.parameters["z_loc"].clone()
    broken[1] = torch.nan
    state = fresh._replace(parameters={**fresh.parameters, "z_loc": broken}, steps_B=torch.full((3,), 4))
    store.keep(ids_B, state)
    assert store.recall(ids_B, fresh).steps_B.tolist() == [4, 0, 4]
