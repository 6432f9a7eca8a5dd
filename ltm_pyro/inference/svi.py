"""`DualRateSVI`: the interface of `pyro.infer.SVI`, with fast steps for local and a slow step for global parameters."""

from collections.abc import Callable
from typing import Any

import torch

from ltm_pyro.contracts import Batch, Guide, Model
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.global_latents import global_kl
from ltm_pyro.inference.learning_rates import Rates, check_rates, parameter_groups, slow_parameters
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.utils.threads import one_at_a_time


class DualRateSVI:
    r"""Stochastic variational inference with one learning rate for thoughts and another for the decoder.

    .. math:: \phi_i \leftarrow \phi_i + \eta_\mathrm{fast} \nabla_{\phi_i} \mathrm{ELBO}_i
        \quad (T_\mathrm{fast} \text{ times}), \qquad
        \beta \leftarrow \beta + \eta_\mathrm{slow} \nabla_\beta \textstyle\sum_i \mathrm{ELBO}_i

    Source: arXiv 2502.01567, algorithm 1. It equals `pyro.infer.SVI` with `pyro.optim.Adam` if there is one fast step,
    the slow gradient is that of the trajectory, and each call of `step` gets the ``state`` of the call before.

    Args:
        model: the Pyro model; its parameters are global.
        guide: the family of q; its local parameters are in a `LocalState`.
        rates: maps a parameter name to optimiser arguments, among them ``lr``, as in `pyro.optim`. Names of q's
            parameters begin with ``local.``, whatever the sites are called; others with the part of the model, as in
            ``named_parameters``: ``lambda name: {"lr": 0.3 if name.startswith("local.") else 4e-4}``.
        inference: options of the fast loop; ``rates`` replaces its ``rate``.
        optimizer: creates the slow optimiser from parameter groups.
        corpus: N, the number of training sequences, over which the KL of `GlobalLatent` variables is divided; the batch
            size if not given.
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
        slow = slow_parameters(model, guide)
        names = [name for name, _ in slow]
        check_rates(rates, names)
        self.optimizer = optimizer(parameter_groups(slow, rates))
        check_rates(rates, names, self.optimizer.defaults)  # torch takes any argument, and uses those that it knows
        self.state: LocalState | None = None

    @one_at_a_time
    def step(self, batch: Batch, state: LocalState | None = None) -> float:
        """One fit and one slow step; returns the loss of the slow step, in nats, and sets ``self.state``.

        The loss is `LocalInference.loss` (−Σ ELBO if ``kl_weight`` is 1) at the last q or averaged over the trajectory,
        depending on ``slow_gradient``, plus B/N of the KL of the global latent variables.

        Args:
            state: the state from which q continues; by default q is initialised by ``inference.init``.
        """
        self.optimizer.zero_grad()
        result = training_loss(self.model, self.guide, batch, self.inference, state, self.rates)
        self.state = result.state
        loss = result.loss + batch.size / (self.corpus or batch.size) * global_kl(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @one_at_a_time
    def evaluate_loss(self, batch: Batch) -> float:
        """−Σ ELBO in nats after a fit, at a draw taken after q is fitted; the model is not trained."""
        state, _ = infer_local(self.model, self.guide, batch, self.inference, rates=self.rates)
        with torch.no_grad():
            return -elbo_terms(self.model, self.guide, batch, state.parameters).elbo_B.sum().item()
