"""A fitted q as an ordinary Pyro guide, for Pyro's own algorithms."""

from typing import Any

from pyro.nn import PyroModule
from torch import nn

from ltm_pyro.contracts import Batch, Guide
from ltm_pyro.inference.learning_rates import LOCAL
from ltm_pyro.inference.state import LocalState


class LocalPosterior(PyroModule):
    """q(z | x_i) for the sequences of one batch, as a module: its local parameters are the module's parameters.

    It is a guide for `pyro.infer.SVI`, `Predictive` and the importance samplers, for the batch that q was fitted to.
    Pyro's optimisers see its parameters under the names that `DualRateSVI` has, ``local.z_loc``.

    Args:
        guide: the variational family.
        state: the state that `infer_local` or `init` returned.
    """

    def __init__(self, guide: Guide, state: LocalState) -> None:
        super().__init__(LOCAL.removesuffix("."))
        self._guide, self._names = guide, list(state.parameters)
        for name, value in state.parameters.items():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, batch: Batch) -> Any:
        """Samples every latent site of the batch from q."""
        return self._guide(batch, {name: getattr(self, name) for name in self._names})
