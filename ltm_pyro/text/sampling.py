"""How the next token is chosen. The filters' names, meanings and order are those of Hugging Face.

Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ltm_pyro.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens are generated after a prompt, and how each of them is chosen.

    Args:
        max_new_tokens: the most tokens after the prompt; `END_OF_TEXT` stops earlier.
        do_sample: draws the tokens; if False, takes the likeliest.
        temperature: divides the logits.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: of those, only the likeliest that together have this probability (arXiv 1904.09751).
        min_p: of those, only tokens with at least this share of the likeliest token's probability (arXiv 2407.01082).
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the row has
            already (Keskar et al. 2019, arXiv 1909.05858).
        num_return_sequences: texts per prompt, each with thoughts of its own.
        stop_strings: a text ends with the token that completes one of them; that token is kept.
    """

    max_new_tokens: int = 64
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"Temperature must be positive and finite, got {self.temperature}: for the likeliest, do not sample."
            )
        if self.top_k < 0:
            raise UsageError(f"top_k must not be negative, got {self.top_k}: use 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be in [0, 1], got {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}: 1 is none."
            )
        if "" in self.stop_strings:
            raise UsageError("A stop string is empty, so every text would end at once: leave it out.")
        neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
        ignored = [name for name, value in neutral.items() if getattr(self, name) != value]
        if ignored and not self.do_sample:
            raise UsageError(
                f"{ignored[0]} {getattr(self, ignored[0])} chooses among draws, but nothing is sampled: drop it."
            )


def penalise(logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"], penalty: float) -> Float[Tensor, "B V"]:
    """Logits with a lower value at tokens seen before."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def filter_logits(logits_BV: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits divided by the temperature; −∞ outside the top k, then outside top p, then below min p."""
    sorted_BV, order_BV = (logits_BV / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    p_BV = sorted_BV.softmax(-1)
    drop_BV = (p_BV.cumsum(-1) - p_BV >= sampling.top_p) | (p_BV < sampling.min_p * p_BV[:, :1])
    drop_BV[:, 0] = False
    return torch.empty_like(sorted_BV).scatter(-1, order_BV, sorted_BV.masked_fill(drop_BV, -torch.inf))


def choose(logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"], sampling: Sampling) -> Int[Tensor, " B"]:
    """One token per row: the likeliest, or the inverse of the cumulative distribution at a uniform number."""
    if not sampling.do_sample:
        return logits_BV.argmax(-1)
    below_BV = filter_logits(logits_BV, sampling).double().softmax(-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None] * below_BV[:, -1:]  # < the total, so never beyond the last token kept
    return torch.searchsorted(below_BV, threshold_B1, right=True)[:, 0]
