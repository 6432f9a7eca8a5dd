"""The thoughts of what has been read: q fitted to each row's tokens, and z drawn from it.

All noise belongs to its row, so that no row's thoughts depend on the rows beside it.
Shapes: B rows, L layers, K thoughts per layer, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import PARTICLES, Batch, make_batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import log_weights, no_param_store
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.local import infer_local, init
from ltm_pyro.inference.state import LocalInference, LocalState
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.runs.run import Run
from ltm_pyro.text.row_noise import ByRow, Key, RowNoise, uniform
from ltm_pyro.text.sampling import Sampling, choose

Tokens = Sequence[int]  # of one row
START, FIT, DRAW, CHOICE, TOKENS = range(5)  # noise of one purpose is never noise of another


@dataclass(frozen=True, kw_only=True)
class ThoughtSampling:
    """How the thoughts of a text are found, and which of them are heard.

    Args:
        inference: the run's own, of evaluation, when not given.
        candidates: draws of z per text; one is kept with probability proportional to its importance weight
            p(x, z) / q(z | x), so that with many z comes from the posterior (sampling importance resampling).
        refit_every: fits q again, and draws z anew, after so many new tokens; 0 for never.
        layers: which of the layers that have thoughts hear them, counted among themselves from 1; all when not given.
    """

    inference: LocalInference | None = None
    candidates: int = 1
    refit_every: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UsageError(f"candidates must be at least 1, got {self.candidates}: a text needs a draw of z.")
        if self.refit_every < 0:
            raise UsageError(f"refit_every must not be negative, got {self.refit_every}: 0 never fits again.")

    def mask_layers(self, z_BLKD: Float[Tensor, "... L K D"]) -> Float[Tensor, "... L K D"]:
        """The thoughts with those of unheard layers at zero, where cross-attention adds exactly nothing."""
        if self.layers is None:
            return z_BLKD
        layers = z_BLKD.shape[-3]
        if wrong := [layer for layer in self.layers if not 1 <= layer <= layers]:
            raise UsageError(f"There is no layer {wrong[0]}: those that hear thoughts are counted from 1 to {layers}.")
        heard_L = torch.tensor([layer + 1 in self.layers for layer in range(layers)], device=z_BLKD.device)
        return z_BLKD * heard_L[:, None, None]


class Weighted(NamedTuple):
    """Draws of z and the logarithms of their importance weights, in nats."""

    z_BLKD: Float[Tensor, "... B L K D"]
    log_weight_B: Float[Tensor, "... B"]


def encode(run: Run, text: str) -> list[int]:
    """A text's tokens."""
    return run.tokenizer.encode(text, add_special_tokens=False).ids


def read(run: Run, rows: Sequence[Tokens]) -> Batch:
    """The batch of the rows' tokens, padded on the right to at least one."""
    lengths_B = torch.tensor([len(row) for row in rows], device=run.device)
    if (longest := int(lengths_B.max())) > run.length:
        raise UsageError(f"A text has {longest} tokens, but the model's length is {run.length}: shorten it.")
    padded = [[*row, *[run.start_token] * (max(longest, 1) - len(row))] for row in rows]
    return make_batch(torch.tensor(padded, device=run.device), lengths_B, run.start_token)


def infer(
    run: Run, batch: Batch, inference: LocalInference, keys: Sequence[Key], state: LocalState | None = None
) -> LocalState:
    """q of every row, its noise from the row's key; goes on from ``state`` when given.

    A stopping rule is left out: it would move rows to other places.
    """
    inference = replace(inference, stop=None)
    with fix_global_draws(run.model, keys[0][0]), ByRow([(START, *key) for key in keys]):
        state = state or init(run.model, run.guide, batch, inference)
    with _noise(run, FIT, keys):
        return infer_local(run.model, run.guide, batch, inference, state)[0]


@contextmanager
def _noise(run: Run, purpose: int, keys: Sequence[Key]) -> Iterator[None]:
    """Each row's from its own key, and what all sequences share from the seed that every key begins with."""
    with fix_global_draws(run.model, keys[0][0]), RowNoise([(purpose, *key) for key in keys]):
        yield


def draw(
    run: Run, batch: Batch, state: LocalState, particles: int | None = None, keys: Sequence[Key] | None = None
) -> Weighted:
    """z of every row, or S of them: from q where the row has tokens, from the prior where it has none.

    Args:
        keys: of the rows' noise; torch's own when not given.
    """
    with torch.no_grad(), no_param_store(), _noise(run, DRAW, keys) if keys else nullcontext():
        plate = nullcontext() if particles is None else pyro.plate(PARTICLES, particles, dim=-2)
        with full_precision(batch.inputs_BT), plate:
            q = poutine.trace(run.guide).get_trace(batch, state.parameters)
        replayed: Any = poutine.replay(run.guide, trace=q)
        log_weight_B = log_weights(run.model, replayed, batch, state.parameters, particles)
        z_BLKD = poutine.replay(run.model.sample_prior, trace=q)(batch.size)
        prior_BLKD = run.model.sample_prior(log_weight_B.numel()).view(z_BLKD.shape)
    read_B = batch.tokens_B > 0
    return Weighted(z_BLKD.where(read_B[:, None, None, None], prior_BLKD), log_weight_B * read_B)


class ThoughtSampler:
    """The thoughts of a few prompts, each in ``copies`` texts; it thinks again when asked, from where it stood.

    Args:
        keys: of the prompts' noise.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[Tokens],
        keys: Sequence[Key],
        thought_sampling: ThoughtSampling,
        copies: int = 1,
    ) -> None:
        self.run, self.prompts, self.thought_sampling, self.copies = run, prompts, thought_sampling, copies
        self.inference = thought_sampling.inference or run.inference
        self.prompt_keys, self.keys = keys, [(*key, copy) for key in keys for copy in range(copies)]
        self.times = 0
        self.state: LocalState | None = None

    def sample(self) -> Float[Tensor, "B L K D"]:
        """One z a text, given its prompt."""
        batch = read(self.run, self.prompts)
        state = infer(self.run, batch, self.inference, self.prompt_keys)
        place_B = torch.arange(batch.size, device=batch.inputs_BT.device).repeat_interleave(self.copies)
        return self._conclude(batch.select(place_B), state.select(place_B))

    def resample(self, rows: Sequence[Tokens]) -> Float[Tensor, "B L K D"]:
        """One z a text, given all that has been written so far; q goes on from where it was."""
        batch = read(self.run, rows)
        return self._conclude(batch, infer(self.run, batch, self.inference, self._keys(), self.state))

    def _conclude(self, batch: Batch, state: LocalState) -> Float[Tensor, "B L K D"]:
        self.times, self.state = self.times + 1, state
        keys = ([(*key, candidate) for key in self._keys()] for candidate in range(self.thought_sampling.candidates))
        drawn = [draw(self.run, batch, state, keys=k) for k in keys]
        if len(drawn) == 1:
            return self.thought_sampling.mask_layers(drawn[0].z_BLKD)
        log_weight_BC = torch.stack([x.log_weight_B for x in drawn], dim=-1)
        uniform_B = uniform(self._keys(), CHOICE, 1)[:, 0].to(log_weight_BC.device)
        chosen_B = choose(log_weight_BC, uniform_B, Sampling())
        z_BCLKD = torch.stack([x.z_BLKD for x in drawn], dim=1)
        return self.thought_sampling.mask_layers(z_BCLKD[torch.arange(batch.size, device=chosen_B.device), chosen_B])

    def _keys(self) -> list[Key]:
        return [(*key, self.times) for key in self.keys]
