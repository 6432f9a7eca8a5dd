"""Writing text: thoughts first, then tokens one by one.

Shapes: B sequences, T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor

from ltm_pyro.contracts import UsageError, make_batch, seeded
from ltm_pyro.local import fit
from ltm_pyro.runs import Run


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; names and meanings are Hugging Face's.

    Args:
        max_new_tokens: at most so many tokens after the prompt; a document's end stops earlier.
        temperature: divides the logits.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise UsageError(f"Temperature must be positive, got {self.temperature}: use a small one, or top_k 1.")
        if self.top_k < 0:
            raise UsageError(f"top_k must not be negative, got {self.top_k}: use 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}.")


def filter_logits(logits_BV: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits at a temperature, −∞ outside the top k and the nucleus (Holtzman et al. 2020, arXiv 1904.09751)."""
    sorted_BV, order_BV = (logits_BV / sampling.temperature).sort(-1, descending=True)
    before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
    drop_BV = before_BV >= sampling.top_p
    if sampling.top_k:
        drop_BV[:, sampling.top_k :] = True
    return torch.empty_like(sorted_BV).scatter(-1, order_BV, sorted_BV.masked_fill(drop_BV, -torch.inf))


def generate(
    run: Run, prompt: str = "", samples: int = 1, sampling: Sampling | None = None, seed: int = 0
) -> list[str]:
    """Texts written behind a prompt, one z each.

    Without a prompt z ~ p(z); with one, q is fitted to the prompt alone and z ~ q(z | prompt) (arXiv 2502.01567,
    section 2.3). What is returned is the continuation.
    """
    sampling = sampling or Sampling()
    prompt_T = run.tokenizer.encode(prompt).ids
    room = run.length - len(prompt_T)
    if room < 1:
        raise UsageError(f"The prompt has {len(prompt_T)} tokens, but the model's length is {run.length}: shorten it.")
    with seeded(seed), torch.no_grad():
        z_BLKD = _thoughts(run, prompt_T, samples)
        rows_BT = write(run, torch.tensor([prompt_T] * samples, dtype=torch.long), z_BLKD, sampling, room)
    return [_decode(run, row[len(prompt_T) :]) for row in rows_BT.tolist()]


def _thoughts(run: Run, prompt_T: list[int], samples: int) -> Float[Tensor, "B L K D"]:
    if not prompt_T:
        return run.model.think(samples)
    row_1T = torch.tensor([prompt_T])
    state, _ = fit(
        run.model, run.guide, make_batch(row_1T, torch.tensor([len(prompt_T)]), run.start_token), run.inference
    )
    local = {name: x.expand(samples, *x.shape[1:]) for name, x in state.parameters.items()}
    batch = make_batch(row_1T.expand(samples, -1), torch.tensor([len(prompt_T)] * samples), run.start_token)
    q = poutine.trace(run.guide).get_trace(batch, local)
    return poutine.replay(run.model.think, trace=q)(samples)


def write(
    run: Run, tokens_BT: Int[Tensor, "B T"], z_BLKD: Float[Tensor, "B L K D"], sampling: Sampling, room: int
) -> Int[Tensor, "B U"]:
    """Prompts and what is written behind them under given thoughts, at most ``room`` tokens; then the start token."""
    decoder = run.model.decoder
    next_BU = torch.cat([tokens_BT.new_full((len(tokens_BT), 1), run.start_token), tokens_BT], dim=1)
    cache, written = decoder.begin(z_BLKD), [tokens_BT]
    ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
    for _ in range(min(room, sampling.max_new_tokens)):
        logits_BV = filter_logits(decoder.read(next_BU, cache) @ decoder.embedding.weight.T, sampling)
        next_B = torch.multinomial(logits_BV.softmax(-1), 1)[:, 0].masked_fill(ended_B, run.start_token)
        ended_B |= next_B == run.start_token
        next_BU = next_B[:, None]
        written.append(next_BU)
        if ended_B.all():
            break
    return torch.cat(written, dim=1)


def _decode(run: Run, tokens: list[int]) -> str:
    """The text up to the document's end; bytes that form no character, such as a half one at the end, are left out."""
    end = tokens.index(run.start_token) if run.start_token in tokens else len(tokens)
    return run.tokenizer.decode(tokens[:end], skip_special_tokens=False).replace("\N{REPLACEMENT CHARACTER}", "")
