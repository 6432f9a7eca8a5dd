"""A fitted q as an ordinary Pyro guide, for everything in Pyro that wants one."""

from typing import Any

from pyro.nn import PyroModule
from torch import nn

from ltm_pyro.contracts import Batch, Guide
from ltm_pyro.inference.state import LocalState


class LocalPosterior(PyroModule):
    r"""q(z | x_i) of one batch's sequences, its local parameters now parameters of a module.

    `pyro.infer.SVI`, `Predictive` and the importance samplers take it as their guide, for the batch it was fitted on.

    Args:
        guide: the family.
        state: what a fit returned, or ``guide.start`` gave.
    """

    def __init__(self, guide: Guide, state: LocalState) -> None:
        super().__init__()
        self._guide, self._names = guide, list(state.parameters)
        for name, value in state.parameters.items():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, batch: Batch) -> Any:
        """Samples every latent site of the batch from q."""
        return self._guide(batch, {name: getattr(self, name) for name in self._names})
