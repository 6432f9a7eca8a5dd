"""Writing text: thoughts first, then tokens one by one, and where wanted thoughts again.

A text depends on its seed and its place among the texts alone: the same whatever is written beside it.
Shapes: B rows, T tokens, V vocabulary, L layers, K thoughts per layer, D width.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run
from ltm_pyro.text.row_noise import Key, uniform
from ltm_pyro.text.sampling import Sampling, choose, penalise
from ltm_pyro.text.streaming import Streamer, TextDecoder, token_texts
from ltm_pyro.text.thoughts import TOKENS, ThoughtSampler, ThoughtSampling, Tokens, encode


def generate(
    run: Run,
    prompts: str | Sequence[str] = "",
    sampling: Sampling | None = None,
    thought_sampling: ThoughtSampling | None = None,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Texts written behind prompts, the first prompt's first; what is returned is the continuations.

    Behind an empty prompt z ~ p(z); else q is fitted to the prompt alone and z ~ q(z | prompt) (arXiv 2502.01567,
    section 2.3).

    Args:
        generator: draws the seed, in place of ``seed``.
        streamer: hears the tokens of a single text as they are written.
        batch_size: texts written together, at most; it changes nothing else.
    """
    sampling, thought_sampling = sampling or Sampling(), thought_sampling or ThoughtSampling()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [encode(run, prompt) for prompt in prompts]
    check_prompts(run, rows)
    copies = sampling.num_return_sequences
    if streamer and len(rows) * copies > 1:
        raise UsageError(f"A streamer hears one text, but {len(rows) * copies} are asked for: ask for one at a time.")
    if generator:
        seed = int(torch.randint(2**62, (), generator=generator))
    keys, each = [(seed, index) for index in range(len(rows))], max(1, batch_size // copies)
    texts: list[str] = []
    for first in range(0, len(rows), each):
        chunk = slice(first, first + each)
        sampler = ThoughtSampler(run, rows[chunk], keys[chunk], thought_sampling, copies)
        repeated = [row for row in rows[chunk] for _ in range(copies)]
        texts += decode(run, write(run, repeated, sampler.sample(), sampler.keys, sampling, sampler, streamer))
    return texts


def interpolate(
    run: Run,
    texts: tuple[str, str],
    steps: int = 5,
    sampling: Sampling | None = None,
    thought_sampling: ThoughtSampling | None = None,
    seed: int = 0,
) -> list[str]:
    r"""What the model writes from thoughts on the way from one text's to another's.

    .. math:: z(\alpha) = \cos(\tfrac{\pi}{2} \alpha) \, z_1 + \sin(\tfrac{\pi}{2} \alpha) \, z_2

    z₁ and z₂ are draws from the texts' posteriors; were they independent draws from a standard normal prior, so would
    every z(α) be. The same noise chooses the tokens at every step.
    """
    if steps < 2:
        raise UsageError(f"An interpolation needs both ends: ask for at least 2 texts, not {steps}.")
    rows = [encode(run, text) for text in texts]
    check_prompts(run, rows, room=0)
    first_LKD, second_LKD = ThoughtSampler(
        run, rows, [(seed, 0), (seed, 1)], thought_sampling or ThoughtSampling()
    ).sample()
    angles_S = torch.linspace(0, math.pi / 2, steps, device=first_LKD.device)[:, None, None, None]
    z_SLKD = angles_S.cos() * first_LKD + angles_S.sin() * second_LKD
    return decode(run, write(run, [[]] * steps, z_SLKD, [(seed, 0)] * steps, sampling or Sampling()))


def check_prompts(run: Run, rows: Sequence[Tokens], room: int = 1) -> None:
    """Refuses a prompt that leaves no room in the model for ``room`` tokens."""
    for row in rows:
        if len(row) + room > run.length:
            raise UsageError(f"A prompt has {len(row)} tokens, but the model's length is {run.length}: shorten it.")


@torch.no_grad()
def write(
    run: Run,
    rows: Sequence[Tokens],
    z_BLKD: Float[Tensor, "B L K D"],
    keys: Sequence[Key],
    sampling: Sampling,
    sampler: ThoughtSampler | None = None,
    streamer: Streamer | None = None,
) -> list[list[int]]:
    """The tokens written behind every row under its thoughts, up to the document's end, which is not among them.

    Args:
        keys: of the rows' noise.
        mind: thinks again along the way, as its `Thinking` says.
    """
    decoder, buffer = run.model.decoder, _TokenBuffer(run, rows, sampling)
    uniform_BN = uniform(keys, TOKENS, sampling.max_new_tokens).to(z_BLKD.device)
    every = sampler.thought_sampling.refit_every if sampler else 0
    lengths_B: Tensor | None
    cache, (unread_BT, lengths_B) = decoder.init_cache(z_BLKD), buffer.whole()
    if streamer:
        streamer.put(torch.tensor([rows[0]], dtype=torch.long))
    for step, uniform_B in enumerate(uniform_BN.T, start=1):
        logits_BV = buffer.penalised(decoder.decode_step(unread_BT, cache, lengths_B) @ decoder.embedding.weight.T)
        next_B = choose(logits_BV, uniform_B, sampling)
        buffer.add(next_B)
        if streamer:
            streamer.put(next_B.cpu())
        if all(buffer.ended):
            break
        unread_BT, lengths_B = next_B[:, None], None
        if sampler and every and step % every == 0:
            cache, (unread_BT, lengths_B) = decoder.init_cache(sampler.resample(buffer.rows)), buffer.whole()
    if streamer:
        streamer.end()
    return [row[first:] for row, first in zip(buffer.rows, buffer.first, strict=True)]


def decode(run: Run, rows: Sequence[Tokens]) -> list[str]:
    """The rows' texts; bytes that form no character, such as a half one at the end, are left out."""
    bytes_V = token_texts(run.tokenizer)
    return [TextDecoder(bytes_V).push(row) for row in rows]


class _TokenBuffer:
    """What has been written so far: every row's prompt and, behind ``first``, its new tokens."""

    def __init__(self, run: Run, prompts: Sequence[Tokens], sampling: Sampling) -> None:
        self.rows, self.first = [list(row) for row in prompts], [len(row) for row in prompts]
        self.ended = [False] * len(self.rows)
        self._run, self._sampling = run, sampling
        bytes_V = token_texts(run.tokenizer) if sampling.stop_strings else []
        self._decoders, self._tails = [TextDecoder(bytes_V) for _ in prompts], [""] * len(self.rows)
        self._seen_BV = self._seen()

    def whole(self) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Every row behind its start token, padded on the right, and their lengths."""
        start, device = self._run.start_token, self._run.device
        longest = max(map(len, self.rows))
        padded = [[start, *row, *[start] * (longest - len(row))] for row in self.rows]
        lengths = [1 + len(row) for row in self.rows]
        return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)

    def penalised(self, logits_BV: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The next tokens' logits, those the row has already made less likely."""
        if self._sampling.repetition_penalty == 1:
            return logits_BV
        return penalise(logits_BV, self._seen_BV, self._sampling.repetition_penalty)

    def add(self, next_B: Int[Tensor, " B"]) -> None:
        """One more token for every row that has not ended."""
        self._seen_BV.scatter_(1, next_B[:, None], True)
        for index, token in enumerate(next_B.tolist()):
            if token == self._run.start_token:
                self.ended[index] = True
            if not self.ended[index]:
                self.rows[index].append(token)
                self.ended[index] = len(self.rows[index]) == self._run.length or self._stops(index, token)

    def _stops(self, index: int, token: int) -> bool:
        stops = self._sampling.stop_strings
        if not stops:
            return False
        tail = self._tails[index] + self._decoders[index].push([token])
        self._tails[index] = tail[-max(map(len, stops)) :]
        return any(stop in tail for stop in stops)

    def _seen(self) -> Tensor:
        """Which tokens each row has: prompt and all, as in Hugging Face's."""
        weight = self._run.model.decoder.embedding.weight
        seen_BV = torch.zeros(len(self.rows), len(weight), dtype=torch.bool, device=weight.device)
        for row, seen_V in zip(self.rows, seen_BV, strict=True):
            seen_V[row] = True
        return seen_BV
