"""How the next token is chosen. The filters' names, meanings and order are those of Hugging Face.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ltm_pyro.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens are generated after a prompt, and how each of them is chosen.

    None as a filter or as the stop strings is none, as it is in Hugging Face's `GenerationConfig`.

    Args:
        max_new_tokens: the most tokens after the prompt; `END_OF_TEXT` and the model's length stop earlier.
        do_sample: draws the tokens; if False, takes the likeliest.
        temperature: divides the logits.
        top_k: only the k likeliest tokens, and those as likely as the last of them; 0 for all.
        top_p: of those, the fewest of the likeliest that together have this probability (arXiv 1904.09751), and at
            least one; 1 for all.
        min_p: of those, only tokens with at least this share of the likeliest token's probability (arXiv 2407.01082).
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the row has
            already (Keskar et al. 2019, arXiv 1909.05858).
        num_return_sequences: texts per prompt, each with thoughts of its own.
        stop_strings: a text ends with the token that completes one of them; that token is kept. One string is itself.
    """

    max_new_tokens: int = 64
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    min_p: float | None = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_strings: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings or ())
        object.__setattr__(self, "stop_strings", stops)
        for option in fields(self):
            if getattr(self, option.name) is None:
                object.__setattr__(self, option.name, option.default)
        self._check_types()
        for name in ("max_new_tokens", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 1e-6 <= self.temperature < math.inf:  # below, quotients of logits overflow
            raise UsageError(
                f"Temperature must be at least 1e-6 and finite, got {self.temperature}: to take the likeliest, do not "
                f"sample."
            )
        top_k, top_p, min_p = self.filters
        if top_k < 0:
            raise UsageError(f"top_k must not be negative, got {top_k}: use 0 for all tokens.")
        if not 0 <= top_p <= 1:
            raise UsageError(f"top_p must be in [0, 1], got {top_p}.")
        if not 0 <= min_p <= 1:
            raise UsageError(f"min_p must be in [0, 1], got {min_p}.")
        if not 1e-3 <= self.repetition_penalty <= 1e3:  # beyond, products with logits overflow
            raise UsageError(
                f"repetition_penalty must be from 0.001 to 1000, got {self.repetition_penalty}: 1 is none."
            )
        if "" in stops:
            raise UsageError("A stop string is empty, so every text would end at once: leave it out.")
        neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
        ignored = [name for name, value in neutral.items() if getattr(self, name) != value]
        if ignored and not self.do_sample:
            raise UsageError(
                f"{ignored[0]} {getattr(self, ignored[0])} chooses among draws, but nothing is sampled: drop it."
            )

    def _check_types(self) -> None:
        kinds = {int: ("a whole number", Integral), float: ("a number", Real), bool: ("True or False", bool)}
        for option in fields(self):
            if option.name == "stop_strings":
                continue
            value, (what, kind) = getattr(self, option.name), kinds[type(option.default)]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{option.name} must be {what}, got {value!r}.")
        if others := [stop for stop in self.stop_strings or () if not isinstance(stop, str)]:
            raise UsageError(f"stop_strings must be texts, got {others[0]!r}.")

    @property
    def filters(self) -> tuple[int, float, float]:
        """top_k, top_p and min_p; 0, 1 and 0 filter nothing."""
        return self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.min_p or 0.0


def penalise(logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"], penalty: float) -> Float[Tensor, "B V"]:
    """Logits with a lower value at tokens seen before."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def filter_logits(logits_BV: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits divided by the temperature; −∞ outside the top k, then outside top p, then below min p.

    As the warpers of `transformers` do it: also where several tokens are as likely as the last one within top p.
    """
    x_BV, (top_k, top_p, min_p) = logits_BV / sampling.temperature, sampling.filters
    if 0 < top_k < x_BV.shape[-1]:
        x_BV = x_BV.masked_fill(x_BV < x_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = x_BV.sort(dim=-1)
        drop_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p  # from the least likely on, where sums lose no digits
        drop_BV[:, -1] = False
        x_BV = x_BV.masked_fill(torch.empty_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf)
    if min_p:
        p_BV = x_BV.softmax(-1)
        x_BV = x_BV.masked_fill(p_BV < min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    return x_BV


def choose(logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"], sampling: Sampling) -> Int[Tensor, " B"]:
    """One token per row: the likeliest, or the inverse of the cumulative distribution at a uniform number."""
    if not sampling.do_sample:
        return logits_BV.argmax(-1)
    below_BV = filter_logits(logits_BV, sampling).double().softmax(-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None] * below_BV[:, -1:]  # < the total, so never beyond the last token kept
    return torch.searchsorted(below_BV, threshold_B1, right=True)[:, 0]
