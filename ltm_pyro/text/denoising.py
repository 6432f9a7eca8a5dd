"""Texts with gaps, filled by masked diffusion: some tokens at a time, in a random order.

Shapes: B rows, T tokens, V vocabulary, n masked tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ltm_pyro.contracts import CachedDecoder
from ltm_pyro.data.encode import Tokens
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.runs.run import Run
from ltm_pyro.text.sampling import Sampling, choose

Gaps = Sequence[int | None]  # a row of tokens, None where one is masked


def fills_gaps(run: Run) -> bool:
    """Whether a run writes by filling gaps, and not from left to right."""
    return not isinstance(run.model.decoder, CachedDecoder) and hasattr(run.model, "length_law")


@torch.no_grad()
def denoise(
    run: Run,
    rows: Sequence[Gaps],
    keys: RowKeys,
    sampling: Sampling,
    steps: int | None = None,
    lengths: Sequence[int] | None = None,
    never: int | None = None,
) -> list[list[int]]:
    r"""The rows with their masked tokens drawn in N steps.

    A step draws a random part of the tokens that are still masked, each independently given all that are there,

    .. math:: p_N(x) = E_{M_1 \ldots M_N} \prod_{j=1}^{N} \prod_{i \in M_j} p(x_i \mid x_{\text{visible before } j})

    where :math:`M_1 \ldots M_N` is a uniform partition of the masked tokens into parts that are as even as they can be.
    With as many steps as masked tokens they are written one by one in a random order: the law to which the bound of the
    model belongs. Fewer steps take less time, and lose what the tokens of one step would tell of each other. Categories
    are drawn in float64 (Zheng et al. 2024, arXiv 2409.02908).

    Args:
        keys: of the rows' random streams, on which they depend, and not on the rest of the batch.
        steps: N; by default, and at most, as many as masked tokens.
        lengths: of the whole texts; what is behind a row stays masked. By default the rows are whole.
        never: a token that is not drawn.
    """
    decoder: Any = run.model.decoder
    ends = [len(row) for row in rows] if lengths is None else [*lengths]
    size, start = max(ends), run.start_token
    padded = [[start if x is None else x for x in row] + [start] * (size - len(row)) for row in rows]
    tokens_BT = torch.tensor(padded, device=run.device)
    position_T = torch.arange(size, device=run.device)
    present_BT = position_T < torch.tensor(ends, device=run.device)[:, None]
    behind_BT = position_T >= torch.tensor([len(row) for row in rows], device=run.device)[:, None]
    gaps = [[x is None for x in row] + [False] * (size - len(row)) for row in rows]
    gaps_BT = torch.tensor(gaps, device=run.device)
    masked_BT = gaps_BT | (behind_BT & present_BT)
    step_BT, uniform_BT = _steps(keys, gaps_BT, steps), keys.fold_in("tokens").uniform(size)
    for step in range(int(step_BT.max()) + 1):
        now_BT = step_BT == step
        hidden_BTD = decoder(decoder.stem(tokens_BT, masked_BT), None, present_BT)
        logits_nV = decoder.logits(hidden_BTD[now_BT])
        if never is not None:
            logits_nV[:, never] = -torch.inf
        tokens_BT[now_BT] = choose(logits_nV, uniform_BT[now_BT], sampling)
        masked_BT = masked_BT & ~now_BT
    return [tokens[: len(row)] for tokens, row in zip(tokens_BT.tolist(), rows, strict=True)]


def _steps(keys: RowKeys, gaps_BT: Bool[Tensor, "B T"], steps: int | None) -> Int[Tensor, "B T"]:
    """The step in which each masked token is drawn, counted from 0; −1 for the others."""
    order_BT = keys.fold_in("order").uniform(gaps_BT.shape[1]).masked_fill(~gaps_BT, torch.inf)
    count_B1 = gaps_BT.sum(-1, keepdim=True)
    steps_B1 = count_B1 if steps is None else count_B1.clamp(max=steps)
    rank_BT = order_BT.argsort(-1).argsort(-1)
    return (rank_BT * steps_B1 // count_B1.clamp(min=1)).masked_fill(~gaps_BT, -1)


@torch.no_grad()
def draw_lengths(run: Run, prompts: Sequence[Tokens], keys: RowKeys) -> list[int]:
    """The length of a text that begins with each prompt, drawn from the model's law of lengths."""
    model: Any = run.model
    least_B = torch.tensor([len(prompt) for prompt in prompts], device=run.device)
    logits_BT = model.length_law(least_B).logits
    return [1 + n for n in choose(logits_BT, keys.fold_in("length").uniform(1)[:, 0], Sampling()).tolist()]


def check_sampling(run: Run, sampling: Sampling, **others: object) -> None:
    """Raises `UsageError` for what has no meaning where gaps are filled in a random order."""
    asked = {name: value for name, value in others.items() if value}
    if sampling.repetition_penalty != 1:
        asked["repetition_penalty"] = sampling.repetition_penalty
    if asked:
        raise UsageError(
            f"{next(iter(asked))} has no meaning for {type(run.model).__name__}, which has no thoughts and fills gaps "
            f"in a random order: leave it out."
        )
