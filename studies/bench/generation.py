"""Generation with and without the key/value cache: tokens per second, and whether late tokens cost more.

Shapes: B texts, T tokens, L layers, K thoughts, D width.
"""

import statistics
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.models import Decoder
from ltm_pyro.studies.bench.clock import How, seconds


def generation(how: How) -> dict[str, Any]:
    """512 greedy tokens of a model of T = 1,024, behind 1 token and behind 512, one text and eight at a time."""
    torch.manual_seed(0)
    decoder = Decoder(vocabulary=8192, layers=3, width=256, heads=4, thoughts=8, window=64, length=1024)
    with torch.no_grad():
        decoder.embedding.weight.mul_(0.3)  # or the model would repeat one token
        return {
            f"{size} at a time behind {prompt} tokens": _measure(decoder, size, prompt, how)
            for size, prompt in product((1, 8), (1, 512))
        }


def _measure(decoder: Decoder, size: int, prompt: int, how: How, tokens: int = 512) -> dict[str, Any]:
    """Without the cache, with it, and, if ``how`` says so, with it and compiled."""
    z_BLKD = torch.randn(size, *decoder.thought_shape)
    prompt_BT = torch.randint(decoder.vocabulary, (size, prompt))
    uncached, slow = _generate(decoder, z_BLKD, prompt_BT, tokens, how, cached=False)
    report: dict[str, Any] = {"uncached": {"tokens_per_second": size * tokens / sum(slow)}}
    for compiled in (False, True) if how.compiled else (False,):
        _generate(decoder, z_BLKD, prompt_BT, 16, how, True, compiled)
        runs = [_generate(decoder, z_BLKD, prompt_BT, tokens, how, True, compiled) for _ in range(how.rounds)]
        report["cached, compiled" if compiled else "cached"] = _speedup(uncached, sum(slow), runs)
    return report


def _speedup(uncached: Tensor, slow: float, runs: list[tuple[Tensor, list[float]]]) -> dict[str, Any]:
    """Throughput, and the 500th token's time over the 50th's: medians over 20 neighbours and all rounds."""
    fast = statistics.median(sum(times) for _, times in runs)
    early, late = (statistics.median(t for _, times in runs for t in times[n - 10 : n + 10]) for n in (50, 500))
    return {
        "tokens_per_second": len(uncached) * len(runs[0][1]) / fast,
        "over_uncached": slow / fast,
        "500th_over_50th": late / early,
        "identical": torch.equal(runs[0][0], uncached),
    }


def _generate(
    decoder: Decoder, z_BLKD: Tensor, prompt_BT: Tensor, tokens: int, how: How, cached: bool, compile: bool = False
) -> tuple[Tensor, list[float]]:
    """The greedy texts after their prompts, and every token's seconds; the first one's include the prompt's."""
    text, cache, times = [prompt_BT], decoder.init_cache(z_BLKD), []

    def next_token() -> None:
        if cached:
            hidden_BD = decoder.decode_step(text[-1], cache, compile=compile)
        else:
            hidden_BD = decoder(decoder.stem(torch.cat(text, 1)), z_BLKD)[:, -1]
        text.append(decoder.logits(hidden_BD).argmax(-1, keepdim=True))

    for _ in range(tokens):
        times.append(seconds(next_token, how))
    return torch.cat(text, 1), times
