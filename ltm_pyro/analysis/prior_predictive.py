"""Before training: what a prior's thoughts are like, and how much they change in the decoder.

What they change stands beside what draws of N(0, I), the paper's prior, change: before training a decoder has no scale
of its own. Shapes: S draws, B sequences, T tokens, L layers, K thoughts, V vocabulary.
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
    """What thoughts change in the decoder.

    ``added`` is by layer that attends to thoughts: the root mean square of what its cross-attention adds to a token,
    over that of what is there. ``information`` is what a draw of z says of the next token, in nats per token:

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
        found, ours, theirs = [], self.effect, self.effect_of_standard_normal
        sizes = [abs(x) for spread in self.sites for x in spread.quantiles]
        if not all(map(np.isfinite, sizes)):
            found.append("Some draws are not finite: bound the prior's parameters, or choose lighter tails.")
        if not any(theirs.added.values()):
            found.append(
                "The cross-attention's output starts at zero (zero_init_cross_attention), so that no prior has "
                "an effect yet: check a prior without it, or a run."
            )
        elif max(ours.added.values()) < max(theirs.added.values()) / FAR:
            found.append(
                f"The prior starves the decoder: its thoughts change less than a tenth of what N(0, I) does. Raise the "
                f"scale of {self.prior}."
            )
        elif max(ours.added.values()) > max(theirs.added.values()) * FAR:
            found.append(
                f"The prior floods the decoder: its thoughts change more than ten times what N(0, I) does. Lower the "
                f"scale of {self.prior}."
            )
        elif theirs.information > 0 and ours.information < theirs.information / FAR:
            found.append(
                "Draws hardly differ in what they say of the next token: most of the prior's thoughts are alike."
            )
        if self.kl is not None and self.kl > self.tokens:
            found.append(
                f"q starts {self.kl:,.1f} nats from the prior, more than one nat for each of {self.tokens:,.0f} "
                f"tokens: raise `model.inference.init.log_var`, or give the prior a start that has moments."
            )
        return found or ["Nothing stands out: the thoughts change about as much in the decoder as those of N(0, I)."]

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
        UsageError: the model has no thoughts.
    """
    if 0 in model.decoder.thought_shape:
        raise UsageError("There are no thoughts (K = 0), so there is no prior to check: set `thoughts` to 1 or more.")
    with torch.no_grad(), no_param_store(model), seeded(seed):
        batch = model.prepare(batch)
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
    """`Effect` of given draws, one draw of all sequences at a time."""
    mean_BTV, entropy_BT, squares = torch.zeros(()), torch.zeros(()), []
    with _what_layers_add(model) as added:
        for z_BLKD in z_SBLKD:
            log_p_BTV = model.observation(z_BLKD, batch).logits.double().log_softmax(-1)
            mean_BTV = mean_BTV + log_p_BTV.exp() / len(z_SBLKD)
            entropy_BT = entropy_BT - (log_p_BTV.exp() * log_p_BTV).sum(-1) / len(z_SBLKD)
            squares.append({layer: torch.stack(pair) for layer, pair in added.items()})
    information_BT = -(mean_BTV * mean_BTV.clamp_min(1e-300).log()).sum(-1) - entropy_BT
    layers = {layer: torch.stack([x[layer] for x in squares]).mean(0) for layer in squares[0]}
    shares = {layer: float((new / old).sqrt()) for layer, (new, old) in layers.items()}
    return Effect(shares, max(0.0, float(information_BT[batch.mask_BT].mean())))


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
