"""Before training: what a prior's thoughts are like, and how much of the decoder's activations comes from them.

That stands beside the same under N(0, I), the paper's prior: before training a decoder has no scale of its own.
Shapes: S draws, B sequences, T tokens, L layers, K thoughts, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import PARTICLES, Batch, Guide, TextModel
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.elbo import Draws, elbo_terms, missing_bound
from ltm_pyro.inference.latent_sites import innermost, is_local
from ltm_pyro.inference.local import init
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.utils.rng import seeded

FAR = 10  # times as much, or as little, as under N(0, I): then a verdict is given
QUANTILES = (0.0, 0.025, 0.5, 0.975, 1.0)


@dataclass(frozen=True)
class Spread:
    """All numbers of one site, over draws, sequences and coordinates: mean, standard deviation and `QUANTILES`."""

    site: str
    family: str
    shape: tuple[int, ...]
    mean: float
    sd: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """What thoughts do to the decoder.

    ``added`` is by layer that attends to thoughts: the root mean square of the cross-attention's output, over that of
    the hidden states that it is added to. ``information`` is what a draw of z says of the next token, in nats per
    token:

    .. math:: I = H(E_z p(x_t | z, x_{<t})) - E_z H(p(x_t | z, x_{<t}))

    which is at most log S with S draws.
    """

    added: dict[int, float]
    information: float


@dataclass(frozen=True)
class PriorPredictive:
    """What `prior_predictive` finds; ``kl`` is KL(q ‖ p) where q starts, nats per sequence (None without a density)."""

    prior: str
    draws: int
    sites: tuple[Spread, ...]
    effect: Effect
    effect_of_standard_normal: Effect
    kl: float | None
    tokens: float

    def verdicts(self) -> list[str]:
        """One sentence for each thing that will make training hard; one that says so if there is none."""
        ours, theirs = self.effect, self.effect_of_standard_normal
        numbers = [x for spread in self.sites for x in spread.quantiles]
        if not np.isfinite([*numbers, *ours.added.values(), ours.information]).all():
            return ["Some draws are not finite: bound the prior's parameters, or choose lighter tails."]
        found = []
        if not any(theirs.added.values()):
            found.append(
                "The cross-attention's output starts at zero (zero_init_cross_attention), so that no prior has an "
                "effect yet: check a prior without it, or a run."
            )
        elif max(ours.added.values()) < max(theirs.added.values()) / FAR:
            found.append(
                f"The cross-attention's output is less than a tenth of what it is under N(0, I): raise the scale of "
                f"{self.prior}."
            )
        elif max(ours.added.values()) > max(theirs.added.values()) * FAR:
            found.append(
                f"The cross-attention's output is more than ten times what it is under N(0, I): lower the scale of "
                f"{self.prior}."
            )
        elif theirs.information > 0 and ours.information < theirs.information / FAR:
            found.append("Draws hardly differ in what they say of the next token: most of the prior's draws are alike.")
        if self.kl is not None and self.kl > self.tokens:
            found.append(
                f"q starts {self.kl:,.1f} nats from the prior, more than one nat for each of {self.tokens:,.0f} "
                f"tokens: raise `model.inference.init.log_var`, or give the prior a start that has moments."
            )
        return found or ["Nothing stands out: the thoughts' effect on the decoder is about that of N(0, I)."]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self) | {"verdicts": self.verdicts(), "quantiles": QUANTILES}


def prior_predictive(
    model: TextModel, guide: Guide, batch: Batch, inference: LocalInference, draws: int = 32, seed: int = 0
) -> PriorPredictive:
    """Draws thoughts from the prior, passes them through the decoder, and starts q; nothing is fitted.

    Args:
        batch: tokens that the decoder reads; their labels, if the prior asks for some.
        inference: where q starts.
        draws: S, of z for each sequence.

    Raises:
        UsageError: the model has no thoughts, or its decoder is not a `Decoder`.
    """
    if 0 in getattr(model.decoder, "thought_shape", (0,)):
        raise UsageError("There are no thoughts (K = 0), so there is no prior to check: use a Latent-Thought model.")
    if not hasattr(model.decoder, "layer_list"):
        raise UsageError(f"{type(model.decoder).__name__} is not ltm_pyro's Decoder, whose layers are looked into.")
    with torch.no_grad(), no_param_store(model), seeded(seed):
        with pyro.plate(PARTICLES, draws, dim=-2):
            trace = poutine.trace(model.sample_prior).get_trace(*prior_arguments(model, batch))
        z_SBLKD: Any = trace.nodes["_RETURN"]["value"]
        sites = tuple(_spread(name, node) for name, node in trace.nodes.items() if is_local(node))
        effect, reference = _effect(model, batch, z_SBLKD), _effect(model, batch, torch.randn_like(z_SBLKD))
        kl = None
        if missing_bound(model, guide) is None:
            local = init(model, guide, batch, inference).parameters
            kl = float(elbo_terms(model, guide, batch, local, Draws(draws, kl=inference.kl)).kl_B.mean())
    tokens = float(batch.tokens_B.double().mean())
    return PriorPredictive(type(model.prior).__name__, draws, sites, effect, reference, kl, tokens)


def _spread(name: str, node: Any) -> Spread:
    values, fn = node["value"].double().flatten(), node["fn"]
    quantiles = np.quantile(values.cpu().numpy(), QUANTILES).tolist()
    shape, family = tuple(fn.event_shape), type(innermost(fn)).__name__
    return Spread(name, family, shape, float(values.mean()), float(values.std()), tuple(quantiles))


def _effect(model: TextModel, batch: Batch, z_SBLKD: Float[Tensor, "S B L K D"]) -> Effect:
    """`Effect` of given draws, one sequence and one draw at a time: without padding, and in little memory."""
    squares: dict[int, list[Tensor]] = {}
    information, tokens = 0.0, 0
    for row in range(batch.size):
        one = batch.select(torch.tensor([row]))
        one = model.prepare(one.crop(0, int(one.mask_BT[0].nonzero().max()) + 1))
        mean_TV, entropy_T = torch.zeros(()), torch.zeros(())
        with _what_layers_add(model) as added:
            for z_BLKD in z_SBLKD[:, row : row + 1]:
                log_p_TV = model.observation(z_BLKD, one).logits[0].double().log_softmax(-1)
                mean_TV = mean_TV + log_p_TV.exp() / len(z_SBLKD)
                entropy_T = entropy_T - (log_p_TV.exp() * log_p_TV).sum(-1) / len(z_SBLKD)
                for layer, pair in added.items():
                    squares.setdefault(layer, []).append(torch.stack(pair) * one.inputs_BT.shape[1])
        information_T = -(mean_TV * mean_TV.clamp_min(1e-300).log()).sum(-1) - entropy_T
        information += float(information_T[one.mask_BT[0]].sum())
        tokens += int(one.tokens_B)
    layers = {layer: torch.stack(pairs).sum(0) for layer, pairs in squares.items()}
    shares = {layer: float((new / old).sqrt()) for layer, (new, old) in layers.items()}
    return Effect(shares, information / tokens)


@contextmanager
def _what_layers_add(model: Any) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """By layer, the mean square of what its cross-attention adds in the latest pass, and of what is there before."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    there: dict[int, Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.decoder.layer_list, 1):
        if block.cross_attention is None:
            continue

        def keep(_: Any, given: tuple[Tensor, ...], layer: int = layer) -> None:
            there[layer] = given[0].double().square().mean()

        def compare(_: Any, given: Any, new: Tensor, layer: int = layer) -> None:
            found[layer] = (new.double().square().mean(), there[layer])

        hooks += [
            block.norm_cross.register_forward_pre_hook(keep),
            block.cross_attention.register_forward_hook(compare),
        ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
