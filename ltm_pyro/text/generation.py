"""Generation: z first, then tokens one by one; on request z is inferred again while the text grows.

A text depends on its prompt, on the random seed and on how often its prompt was given before, not on the other prompts.
Shapes: B rows, T tokens, N new tokens, V vocabulary, L layers, K thoughts per layer, D width.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ltm_pyro.data.encode import Tokens, batch_of_rows, encode_document, encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.runs.run import Run
from ltm_pyro.text.denoising import check_sampling, denoise, draw_lengths, fills_gaps
from ltm_pyro.text.sampling import Sampling, choose, penalise
from ltm_pyro.text.streaming import Streamer, TextDecoder, token_texts
from ltm_pyro.text.thoughts import ThoughtSampler, ThoughtSampling
from ltm_pyro.utils.threads import one_at_a_time


@one_at_a_time
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
    compile: bool = False,
    denoising_steps: int | None = None,
) -> list[str]:
    """Continuations of the prompts, in the order of the prompts.

    z ~ p(z) for an empty prompt; otherwise q is fitted to the prompt alone and z ~ q(z | prompt) (arXiv 2502.01567,
    section 2.3). `END_OF_TEXT` is not appended to a prompt.

    Masked diffusion keeps a prompt as it is, draws the length of the text from the model's law of lengths, and fills
    the rest in a random order (`ltm_pyro.text.denoising.denoise`); see also `infill`.

    Args:
        generator: draws the random seed, in place of ``seed``.
        streamer: receives the tokens of a single text as they are generated.
        batch_size: the most texts generated together; it does not change them.
        compile: decodes single tokens with torch's compiler: about twice as fast after half a minute.
        denoising_steps: N of masked diffusion: in so many steps a text is filled; by default token by token.
    """
    rows = [encode_prompt(run.tokenizer, prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if generator:
        seed = int(torch.randint(2**62, (), generator=generator))
    return generate_from_tokens(
        run, rows, sampling, thought_sampling, seed, streamer, batch_size, compile, denoising_steps
    )


@one_at_a_time
def generate_from_tokens(
    run: Run,
    rows: Sequence[Tokens],
    sampling: Sampling | None = None,
    thought_sampling: ThoughtSampling | None = None,
    seed: int = 0,
    streamer: Streamer | None = None,
    batch_size: int = 32,
    compile: bool = False,
    denoising_steps: int | None = None,
) -> list[str]:
    """`generate` for prompts that are tokens already, such as the end of a longer one."""
    sampling, thought_sampling = sampling or Sampling(), thought_sampling or ThoughtSampling()
    check_prompts(run, rows)
    copies = sampling.num_return_sequences
    if streamer and len(rows) * copies > 1:
        raise UsageError(f"A streamer takes one text, but {len(rows) * copies} are asked for: ask for one at a time.")
    if fills_gaps(run):
        others = {name: getattr(thought_sampling, name) for name in ("refit_every", "layers")}
        others |= {"candidates": thought_sampling.candidates > 1, "stream": streamer is not None, "compile": compile}
        check_sampling(run, sampling, **others)
        return _continue(run, [row for row in rows for _ in range(copies)], sampling, seed, batch_size, denoising_steps)
    if denoising_steps is not None:
        raise UsageError(
            f"This run writes from left to right, not in {denoising_steps} denoising steps: leave them out."
        )
    given = Counter[tuple[int, ...]]()
    size = max(1, batch_size // copies)
    texts: list[list[str]] = [[]] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # little of a batch is padding then
    for first in range(0, len(rows), size):
        numbers = by_length[first : first + size]
        chunk = [rows[n] for n in numbers]
        times = _times_given(chunk, given)
        sampler = ThoughtSampler(run, chunk, prompt_keys(run, chunk, seed, times), thought_sampling, copies)
        repeated = [row for row in chunk for _ in range(copies)]
        z_BLKD = sampler.sample()
        written = decode(run, write(run, repeated, z_BLKD, sampler.keys, sampling, sampler, streamer, compile))
        for place, n in enumerate(numbers):
            texts[n] = written[place * copies : (place + 1) * copies]
    return [text for of_row in texts for text in of_row]


@one_at_a_time
def infill(
    run: Run,
    parts: Sequence[str | int],
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    denoising_steps: int | None = None,
) -> list[str]:
    """Whole texts in which the gaps between the given parts are filled; for runs of masked diffusion only.

    Args:
        parts: texts, each encoded by itself, and gaps: numbers of tokens. The text ends behind the last one.
        sampling: ``num_return_sequences`` says how many texts; ``max_new_tokens`` has no meaning.
        denoising_steps: N; by default the gaps are filled token by token.
    """
    sampling = sampling or Sampling()
    if not fills_gaps(run):
        raise UsageError(
            "This run writes from left to right and sees no text behind a gap: use a masked diffusion run."
        )
    check_sampling(run, sampling, stop_strings=sampling.stop_strings)
    row: list[int | None] = []
    for part in parts:
        row += encode_prompt(run.tokenizer, part) if isinstance(part, str) else [None] * part
    if None not in row or any(part < 1 for part in parts if isinstance(part, int)):
        raise UsageError("There is no gap to fill, or one of no tokens: give each at least one token.")
    if len(row) >= run.length:
        raise UsageError(f"Text and gaps have {len(row)} tokens, but the model's length is {run.length}: shorten them.")
    rows = [[*row, run.start_token]] * sampling.num_return_sequences  # the text ends there
    known = [[token for token in row if token is not None]] * len(rows)
    keys = prompt_keys(run, known, seed, range(len(rows)))
    return decode(run, [x[:-1] for x in denoise(run, rows, keys, sampling, denoising_steps, never=run.start_token)])


def _continue(
    run: Run, prompts: Sequence[Tokens], sampling: Sampling, seed: int, batch_size: int, steps: int | None
) -> list[str]:
    """The continuations by masked diffusion; a text that is drawn longer than asked for is left unfinished."""
    given, texts = Counter[tuple[int, ...]](), list[str]()
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        keys = prompt_keys(run, chunk, seed, _times_given(chunk, given))
        lengths = draw_lengths(run, chunk, keys)
        most = [min(n - len(row), sampling.max_new_tokens) for n, row in zip(lengths, chunk, strict=True)]
        rows = [[*row, *[None] * n] for row, n in zip(chunk, most, strict=True)]
        for row, tokens in zip(chunk, denoise(run, rows, keys, sampling, steps, lengths), strict=True):
            new = tokens[len(row) :]
            new = new[: new.index(run.start_token)] if run.start_token in new else new
            texts.append(_up_to_stop(run, new, sampling.stop_strings or ()))
    return texts


def _times_given(rows: Sequence[Tokens], given: Counter[tuple[int, ...]]) -> list[int]:
    """How often each row was given before, counted in ``given``: a prompt given twice has two different texts."""
    times = []
    for row in rows:
        times.append(given[tuple(row)])
        given[tuple(row)] += 1
    return times


def _up_to_stop(run: Run, tokens: Tokens, stops: Sequence[str]) -> str:
    """The text of tokens up to the one that completes a stop string."""
    decoder, text = TextDecoder(token_texts(run.tokenizer)), ""
    for token in tokens:
        text += decoder.push([token])
        if any(stop in text for stop in stops):
            break
    return text


@one_at_a_time
def interpolate(
    run: Run,
    texts: tuple[str, str],
    steps: int = 5,
    sampling: Sampling | None = None,
    thought_sampling: ThoughtSampling | None = None,
    seed: int = 0,
    compile: bool = False,
) -> list[str]:
    r"""Texts generated at ``steps`` points between the thoughts of one text and those of another.

    .. math:: z(\alpha) = \cos(\tfrac{\pi}{2} \alpha) \, z_1 + \sin(\tfrac{\pi}{2} \alpha) \, z_2

    z₁ and z₂ are draws from the posteriors of the two texts, each read as a whole document. If they were independent
    draws from a standard normal prior, so would every z(α) be. The tokens of all steps are chosen with the same noise.
    """
    if fills_gaps(run):
        raise UsageError("This run has no thoughts to interpolate between: leave that to a Latent-Thought model.")
    if steps < 2:
        raise UsageError(f"An interpolation needs both ends: ask for at least 2 texts, not {steps}.")
    rows = [encode_document(run.tokenizer, text) for text in texts]
    keys = prompt_keys(run, rows, seed, range(2))
    first_LKD, second_LKD = ThoughtSampler(run, rows, keys, thought_sampling or ThoughtSampling()).sample()
    angles_S = torch.linspace(0, math.pi / 2, steps, device=first_LKD.device)[:, None, None, None]
    z_SLKD = angles_S.cos() * first_LKD + angles_S.sin() * second_LKD
    same_keys = prompt_keys(run, [[]] * steps, seed)
    return decode(run, write(run, [[]] * steps, z_SLKD, same_keys, sampling or Sampling(), compile=compile))


def check_prompts(run: Run, rows: Sequence[Tokens]) -> None:
    """Raises `UsageError` for a prompt behind which there is no room for a token."""
    if too_long := [len(row) for row in rows if len(row) >= run.length]:
        raise UsageError(f"A prompt has {too_long[0]} tokens, but the model's length is {run.length}: shorten it.")


def prompt_keys(run: Run, rows: Sequence[Tokens], seed: int, numbers: Sequence[int] | None = None) -> RowKeys:
    """The keys of rows of tokens; ``numbers`` tell equal rows apart."""
    keys = RowKeys.of_batch(batch_of_rows(rows, run.start_token, run.length, run.device), seed)
    return keys if numbers is None else keys.fold_in(torch.tensor(numbers, device=keys.key_B.device))


@one_at_a_time
@torch.no_grad()
def write(
    run: Run,
    rows: Sequence[Tokens],
    z_BLKD: Float[Tensor, "B L K D"],
    keys: RowKeys,
    sampling: Sampling,
    sampler: ThoughtSampler | None = None,
    streamer: Streamer | None = None,
    compile: bool = False,
) -> list[list[int]]:
    """The tokens generated after every row, given its z; `END_OF_TEXT` ends a row and is left out.

    Args:
        keys: of the rows' random streams.
        sampler: draws z again along the way, as its `ThoughtSampling` says.
    """
    decoder, buffer = run.model.decoder, _TokenBuffer(run, rows, sampling)
    uniform_BN = keys.fold_in("tokens").uniform(sampling.max_new_tokens)
    refit_every = sampler.thought_sampling.refit_every if sampler else 0
    lengths_B: Tensor | None
    cache, (tokens_BT, lengths_B) = decoder.init_cache(z_BLKD), buffer.padded()
    if streamer:
        streamer.put(torch.tensor([rows[0]], dtype=torch.long))
    for step, uniform_B in enumerate(uniform_BN.T, start=1):
        logits_BV = decoder.logits(decoder.decode_step(tokens_BT, cache, lengths_B, compile=compile))
        if sampling.repetition_penalty != 1:
            logits_BV = penalise(logits_BV, buffer.seen_BV, sampling.repetition_penalty)
        next_B = choose(logits_BV, uniform_B, sampling)
        buffer.add(next_B)
        if streamer:
            streamer.put(next_B.cpu())
        if all(buffer.ended):
            break
        tokens_BT, lengths_B = next_B[:, None], None
        if sampler and refit_every and step % refit_every == 0:
            cache, (tokens_BT, lengths_B) = decoder.init_cache(sampler.resample(buffer.rows)), buffer.padded()
    if streamer:
        streamer.end()
    return [row[len(prompt) :] for row, prompt in zip(buffer.rows, rows, strict=True)]


def decode(run: Run, rows: Sequence[Tokens]) -> list[str]:
    """The rows' texts; bytes that are no character, such as half of one at the end, are left out."""
    bytes_V = token_texts(run.tokenizer)
    return [TextDecoder(bytes_V).push(row) for row in rows]


class _TokenBuffer:
    """The rows of a batch as they are generated, each with its prompt; which have ended, and which tokens each has."""

    def __init__(self, run: Run, prompts: Sequence[Tokens], sampling: Sampling) -> None:
        self.rows, self.ended = [list(row) for row in prompts], [False] * len(prompts)
        self._run, self._stops = run, tuple(sampling.stop_strings or ())
        bytes_V = token_texts(run.tokenizer) if self._stops else []
        self._decoders, self._tails = [TextDecoder(bytes_V) for _ in prompts], [""] * len(prompts)
        self.seen_BV = torch.zeros(len(prompts), run.model.decoder.vocabulary, dtype=torch.bool, device=run.device)
        for row, seen_V in zip(self.rows, self.seen_BV, strict=True):
            seen_V[row] = True  # the prompt's tokens too, as in Hugging Face's generate

    def padded(self) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Every row after its start token, padded on the right, and their lengths."""
        start, device = self._run.start_token, self._run.device
        longest = max(map(len, self.rows))
        padded = [[start, *row, *[start] * (longest - len(row))] for row in self.rows]
        lengths = [1 + len(row) for row in self.rows]
        return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)

    def add(self, next_B: Int[Tensor, " B"]) -> None:
        """Appends a token to every row that has not ended: by `END_OF_TEXT`, the model's length or a stop string."""
        self.seen_BV.scatter_(1, next_B[:, None], True)
        for index, token in enumerate(next_B.tolist()):
            if self.ended[index] or token == self._run.start_token:
                self.ended[index] = True
                continue
            self.rows[index].append(token)
            stopped = False
            if self._stops:
                tail = self._tails[index] + self._decoders[index].push([token])
                stopped = any(stop in tail for stop in self._stops)
                self._tails[index] = tail[-max(map(len, self._stops)) :]
            self.ended[index] = stopped or len(self.rows[index]) == self._run.length
