"""The fused cross-entropy alone, by size of its tiles: its share of the matrix rate in a fast step."""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.nn.cross_entropy import token_nats
from ltm_pyro.nn.cross_entropy_autograd import LARGE_TILE, TILES, Tile
from ltm_pyro.studies.bench.clock import How, in_turn, matrix_rate, spread

WIDTH, VOCABULARY = 512, 50_257
TOKENS = {"cpu": 1024, "cuda": 32_768}
SIDES = {  # tokens, vocabulary entries
    "cpu": ((512, 1024, 2048), (512, 1024, 2048)),
    "cuda": ((4096, 8192, 16_384), (8192, 16_384, 65_536)),
}


def head(how: How) -> dict[str, Any]:
    """Seconds of value and gradient in bfloat16, 4 V D FLOPs per token, and their share of the matrix rate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_ND, embedding_VD = (
        torch.randn(n, WIDTH, device=device, dtype=torch.bfloat16) for n in (TOKENS[device], VOCABULARY)
    )
    value_N = torch.randint(VOCABULARY, (TOKENS[device],), device=device)
    tiles = list(product(*SIDES[device]))
    runs = {tile: partial(_gradient, hidden_ND, embedding_VD, value_N, tile) for tile in tiles}
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2 * len(tiles)):
        times = in_turn(runs, how)  # each with kernels of its own static shapes, as in training
    rate, flops = matrix_rate("bfloat16", how, device), 4 * VOCABULARY * WIDTH * TOKENS[device]
    found = {tile: spread(values)["median"] for tile, values in times.items()}
    rows = {f"{a} x {b}": {"seconds": x, "of_matrix_rate": flops / x / rate} for (a, b), x in found.items()}
    return {"device": device, "tokens": TOKENS[device], "tiles": rows}


def _gradient(hidden_ND: Tensor, embedding_VD: Tensor, value_N: Tensor, tile: tuple[int, int]) -> None:
    device, before = hidden_ND.device.type, dict(TILES)
    TILES[device] = Tile(*tile, before.get(device, LARGE_TILE).multiple)
    try:
        leaf_1ND = (hidden_ND[None] / WIDTH**0.5).requires_grad_()
        torch.autograd.grad(token_nats(leaf_1ND, embedding_VD, value_N[None]).sum(), leaf_1ND)
    finally:
        TILES.clear()
        TILES.update(before)
    if device == "cuda":
        torch.cuda.synchronize()
