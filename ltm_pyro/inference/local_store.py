"""Persistent local parameters: the `LocalState` of every training sequence, stored between epochs.

Shapes: N sequences in the store, B sequences of a batch.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalState

STEPS = "steps"


class LocalStore:
    """Local states by sequence id, in memory or, with a ``directory``, in memory-mapped files that outlive the process.

    Args:
        sequences: N; ids go from 0 to N − 1.
        directory: the folder of the files; created at the first use. Existing files are opened.
    """

    def __init__(self, sequences: int, directory: Path | None = None) -> None:
        if directory and directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is a file, and local parameters need a folder: choose another keep_local.")
        self.sequences, self.directory = sequences, directory
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, ids_B: Int[Tensor, " B"], default: LocalState) -> LocalState:
        """The stored states of some sequences; a sequence that was never stored has its state from ``default``."""
        index = ids_B.cpu().numpy()
        rows = _flatten(default)
        is_stored_B = torch.from_numpy(self._array(STEPS, rows[STEPS])[index] > 0).to(ids_B.device)
        stored = {name: torch.from_numpy(self._array(name, x)[index]).to(x) for name, x in rows.items()}
        chosen = {
            name: torch.where(is_stored_B.view(-1, *[1] * (x.dim() - 1)), stored[name], x) for name, x in rows.items()
        }
        return _unflatten(chosen, default)

    def put(self, ids_B: Int[Tensor, " B"], state: LocalState) -> None:
        """Stores the states of some sequences; a non-finite state is not stored."""
        rows = _flatten(state)
        is_finite_B = torch.stack([x.flatten(1).isfinite().all(1) for x in rows.values() if x.dim() > 1]).all(0)
        index = ids_B[is_finite_B].cpu().numpy()
        for name, x in rows.items():
            self._array(name, x)[index] = x[is_finite_B].detach().cpu().numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """The content of the store for a checkpoint; empty if it is in files."""
        return {} if self.directory else {name: torch.from_numpy(x.copy()) for name, x in self._arrays.items()}

    def load_state_dict(self, arrays: dict[str, Tensor]) -> None:
        """Restores the content that `state_dict` returned."""
        self._arrays.update({name: x.numpy().copy() for name, x in arrays.items()})

    def _array(self, name: str, like: Tensor) -> np.ndarray:
        shape, dtype = (self.sequences, *like.shape[1:]), like.detach().cpu().numpy().dtype
        if name not in self._arrays:
            self._arrays[name] = np.zeros(shape, dtype) if self.directory is None else self._open(name, shape, dtype)
        if self._arrays[name].shape != shape:
            raise UsageError(
                f"The stored local parameter '{name}' has shape {self._arrays[name].shape}, but this model and data "
                f"need {shape}: remove {self.directory or 'it from the checkpoint'}, or use the recipe it came from."
            )
        return self._arrays[name]

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        assert self.directory is not None
        path = self.directory / f"{name}.npy"
        if path.exists():
            return np.lib.format.open_memmap(path, mode="r+")
        path.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _flatten(state: LocalState) -> dict[str, Tensor]:
    moments = {f"{name}.{k}": x for name, m in state.moments.items() for k, x in m.items()}
    return {**state.parameters, **moments, STEPS: state.steps_B}


def _unflatten(rows: dict[str, Tensor], like: LocalState) -> LocalState:
    parameters = {name: rows[name] for name in like.parameters}
    moments = {name: {k: rows[f"{name}.{k}"] for k in m} for name, m in like.moments.items()}
    return LocalState(parameters, moments, rows[STEPS], like.noise)
