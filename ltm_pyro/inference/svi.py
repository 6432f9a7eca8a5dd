"""`DualRateSVI`: the face of `pyro.infer.SVI`, with a fast loop for what is local and a slow step for the rest."""

from collections.abc import Callable
from typing import Any

import torch

from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.global_latents import global_kl
from ltm_pyro.inference.learning_rates import Rates, parameter_groups, slow_parameters
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference, LocalState


class DualRateSVI:
    r"""Stochastic variational inference with one rate for thoughts and another for the decoder.

    .. math:: \phi_i \leftarrow \phi_i + \eta_\mathrm{fast} \nabla_{\phi_i} \mathrm{ELBO}_i
        \quad (T_\mathrm{fast} \text{ times}), \qquad
        \beta \leftarrow \beta + \eta_\mathrm{slow} \nabla_\beta \textstyle\sum_i \mathrm{ELBO}_i

    Source: arXiv 2502.01567, algorithm 1. With one fast step, the slow gradient over the trajectory and ``state``
    handed on from step to step it is `pyro.infer.SVI` with `pyro.optim.Adam`.

    Args:
        model: the Pyro model, whose parameters are global.
        guide: the family of q, whose local parameters live in a `LocalState`.
        rates: parameter name to optimiser arguments, as `pyro.optim` takes it:
            ``lambda name: {"lr": 0.3 if name.startswith("z_") else 4e-4}``.
        inference: the fast loop; its ``rate`` gives way to ``rates``.
        optimizer: makes the slow optimiser from parameter groups.
        corpus: N, the sequences among which the KL of `Shared` variables is divided; the batch when not given.
    """

    def __init__(
        self,
        model: Model,
        guide: Guide,
        rates: Rates,
        inference: LocalInference,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.Adam,
        corpus: int | None = None,
    ) -> None:
        self.model, self.guide, self.rates, self.inference = model, guide, rates, inference
        self.corpus = corpus
        self.optimizer = optimizer(parameter_groups(slow_parameters(model, guide), rates))
        self.state: LocalState | None = None

    def step(self, batch: Batch, state: LocalState | None = None) -> float:
        """One fit and one slow step; returns the loss it went down, in nats. ``self.state`` is then the batch's state.

        That is `LocalInference.loss`, −Σ ELBO if ``kl_weight`` is 1, at the last q or averaged over the trajectory as
        ``slow_gradient`` says, and B/N of the KL of what all sequences share.

        Args:
            state: where q goes on; by default it starts anew at ``inference.start``.
        """
        self.optimizer.zero_grad()
        learned = training_loss(self.model, self.guide, batch, self.inference, state, self.rates)
        self.state = learned.state
        loss = learned.loss + batch.size / (self.corpus or batch.size) * global_kl(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate_loss(self, batch: Batch) -> float:
        """−Σ ELBO in nats after a fit, with noise drawn after q is final; nothing is learned."""
        state, _ = infer_local(self.model, self.guide, batch, self.inference, rates=self.rates)
        with torch.no_grad():
            return -elbo_terms(self.model, self.guide, batch, state.parameters).elbo_B.sum().item()
