"""Thoughts for generation: q is fitted to the tokens of each row, and z is drawn from it.

Each row has random streams of its own (`RowKeys`), so that its thoughts do not depend on the other rows of the batch.
Shapes: B rows, L layers, K thoughts per layer, D width.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import PARTICLES, Batch
from ltm_pyro.data.encode import Tokens, batch_of_rows
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments, with_labels
from ltm_pyro.inference.elbo import log_weights
from ltm_pyro.inference.global_latents import fix_draws_by_keys
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.runs.run import Run
from ltm_pyro.text.sampling import Sampling, choose
from ltm_pyro.utils.threads import one_at_a_time


@dataclass(frozen=True, kw_only=True)
class ThoughtSampling:
    """How the thoughts of a text are inferred, and which layers attend to them.

    Args:
        inference: settings of local inference; those of the run's evaluation when not given.
        candidates: draws of z per text; one is kept with probability proportional to its importance weight
            p(x, z) / q(z | x), so that with many z comes from the posterior (sampling importance resampling).
        refit_every: fits q again, and draws z anew, after so many new tokens; 0 for never.
        layers: which layers attend to their thoughts, counted from 1 among those that have thoughts; all when not
            given.
        labels: of the documents that are written, for a prior that asks for them: by name, such as their source.
    """

    inference: LocalInference | None = None
    candidates: int = 1
    refit_every: int = 0
    layers: tuple[int, ...] | None = None
    labels: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UsageError(f"candidates must be at least 1, got {self.candidates}: a text needs a draw of z.")
        if self.refit_every < 0:
            raise UsageError(f"refit_every must not be negative, got {self.refit_every}: 0 never fits again.")

    def mask_layers(self, z_BLKD: Float[Tensor, "... L K D"]) -> Float[Tensor, "... L K D"]:
        """z with zeros in the layers that are left out: there cross-attention adds exactly nothing."""
        if self.layers is None:
            return z_BLKD
        layers = z_BLKD.shape[-3]
        if wrong := [layer for layer in self.layers if not 1 <= layer <= layers]:
            raise UsageError(
                f"There is no layer {wrong[0]}: the layers with thoughts are counted from 1 to {layers}; choose among "
                f"them."
            )
        kept_L = torch.tensor([layer + 1 in self.layers for layer in range(layers)], device=z_BLKD.device)
        return z_BLKD * kept_L[:, None, None]


class WeightedThoughts(NamedTuple):
    """Draws of z and their log importance weights, log p(x, z) − log q(z | x), in nats."""

    z_BLKD: Float[Tensor, "... B L K D"]
    log_weight_B: Float[Tensor, "... B"]


@one_at_a_time
def draw_thoughts(
    run: Run,
    batch: Batch,
    state: LocalState,
    particles: int | None = None,
    keys: RowKeys | None = None,
    first: int = 0,
    noise: RowNoise | None = None,
) -> WeightedThoughts:
    """One z per row, or S of them: from q if the row has tokens, from the prior (with weight 1) if it has none.

    Args:
        keys: of the rows' random streams; torch's default generator when not given.
        first: the number of the first of the S draws.
        noise: of q, instead of that of the keys.
    """
    noise = noise or (keys and RowNoise(keys.fold_in("q"), first))
    prior_noise = keys and RowNoise(keys.fold_in("prior"), first)
    plate = nullcontext() if particles is None else pyro.plate(PARTICLES, particles, dim=-2)
    with torch.no_grad(), no_param_store(run.model), fix_draws_by_keys(run.model, keys):
        with full_precision(batch.inputs_BT), noise or nullcontext(), plate:
            q = poutine.trace(run.guide).get_trace(batch, state.parameters)
        replayed = poutine.replay(run.guide, trace=q)
        log_weight_B = log_weights(run.model, replayed, batch, state.parameters, particles)
        with plate:
            z_BLKD = poutine.replay(run.model.sample_prior, trace=q)(*prior_arguments(run.model, batch))
        with prior_noise or nullcontext(), plate:
            prior_BLKD = run.model.sample_prior(*prior_arguments(run.model, batch))
    has_tokens_B = batch.tokens_B > 0
    return WeightedThoughts(z_BLKD.where(has_tokens_B[:, None, None, None], prior_BLKD), log_weight_B * has_tokens_B)


class ThoughtSampler:
    """Draws the thoughts of a few prompts, for ``copies`` texts each, and again while the texts grow.

    Args:
        keys: of the prompts' random streams.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[Tokens],
        keys: RowKeys,
        thought_sampling: ThoughtSampling,
        copies: int = 1,
    ) -> None:
        self.run, self.prompts, self.thought_sampling, self.copies = run, prompts, thought_sampling, copies
        self.inference = thought_sampling.inference or run.inference
        prompt_B = torch.arange(len(prompts), device=keys.key_B.device).repeat_interleave(copies)
        copy_B = torch.arange(copies, device=keys.key_B.device).repeat(len(prompts))
        self.prompt_keys, self.keys, self.prompt_B = keys, keys.select(prompt_B).fold_in(copy_B), prompt_B
        self.fits = 0
        self.state: LocalState | None = None

    def sample(self) -> Float[Tensor, "B L K D"]:
        """One z per text, given its prompt; q is fitted once per prompt."""
        batch = self._labelled(self.prompts)
        state, _ = infer_local(self.run.model, self.run.guide, batch, self.inference, keys=self.prompt_keys)
        return self._draw(batch.select(self.prompt_B), state.select(self.prompt_B))

    def resample(self, rows: Sequence[Tokens]) -> Float[Tensor, "B L K D"]:
        """One z per text, given prompt and everything written so far; q continues from its last state."""
        batch = self._labelled(rows)
        keys = self.keys.fold_in(self.fits)
        return self._draw(
            batch, infer_local(self.run.model, self.run.guide, batch, self.inference, self.state, keys=keys)[0]
        )

    def _labelled(self, rows: Sequence[Tokens]) -> Batch:
        batch = batch_of_rows(rows, self.run.start_token, self.run.length, self.run.device)
        return with_labels_asked_for(self.run, batch, self.thought_sampling.labels)

    def _draw(self, batch: Batch, state: LocalState) -> Float[Tensor, "B L K D"]:
        """Sampling importance resampling: the candidates, and one of them per text by its weight."""
        self.fits, self.state = self.fits + 1, state
        keys, candidates = self.keys.fold_in(self.fits), range(self.thought_sampling.candidates)
        drawn = [draw_thoughts(self.run, batch, state, keys=keys, first=candidate) for candidate in candidates]
        z_BLKD = drawn[0].z_BLKD
        if len(drawn) > 1:
            log_weight_BC = torch.stack([x.log_weight_B for x in drawn], dim=-1)
            uniform_B = keys.fold_in("candidate").uniform(1)[:, 0]
            chosen_B = choose(log_weight_BC, uniform_B, Sampling())
            z_BCLKD = torch.stack([x.z_BLKD for x in drawn], dim=1)
            z_BLKD = z_BCLKD[torch.arange(batch.size, device=chosen_B.device), chosen_B]
        return self.thought_sampling.mask_layers(z_BLKD)


def with_labels_asked_for(run: Run, batch: Batch, labels: Mapping[str, str | float]) -> Batch:
    """The batch with the same labels for all; `UsageError` for one that the prior does not ask for."""
    asked: Any = getattr(run.model, "covariates", None)
    if wrong := sorted({*labels} - {*(asked.names if asked else ())}):
        known = f"its labels are {', '.join(asked.names)}" if asked and asked.names else "it asks for none"
        raise UsageError(f"The run's prior does not ask for the label '{wrong[0]}': {known}.")
    return with_labels(batch, [labels] * batch.size) if labels else batch
