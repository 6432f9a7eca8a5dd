"""Documents that repeat an earlier one: near-duplicates by MinHash (Broder 1997) with banding.

Shapes: N documents, m shingles, B bands.
"""

import numpy as np
from jaxtyping import Bool, Int, UInt

BANDS, ROWS = 16, 8  # texts with Jaccard similarity s agree in a band with probability 1 − (1 − s^8)^16
_WIDTH = 24  # bytes of a shingle, from a word's start: some four words
_AT_ONCE = 4096
_ODD_P, _SHIFT_P = np.random.default_rng(0).integers(0, 2**64, (2, BANDS * ROWS), np.uint64) | np.uint64(1)


def signature(text: str) -> UInt[np.ndarray, " B"]:
    """One number for each band; texts that agree in any band are near-duplicates, as half of all pairs with s = 0.7.

    Upper and lower case and the kind and number of spaces make no difference.
    """
    minima_P = np.full(BANDS * ROWS, 2**64 - 1, np.uint64)
    shingles_m = _shingles(text)
    for i in range(0, len(shingles_m), _AT_ONCE):
        hashed_mP = mix_bits(shingles_m[i : i + _AT_ONCE, None] * _ODD_P + _SHIFT_P)
        minima_P = np.minimum(minima_P, hashed_mP.min(0))
    return mix_bits(minima_P * _ODD_P).reshape(BANDS, ROWS).sum(1, dtype=np.uint64)


def repeats(signatures_NB: UInt[np.ndarray, "N B"]) -> Bool[np.ndarray, " N"]:
    """Whether an earlier document has the same number in a band."""
    repeats_N = np.zeros(len(signatures_NB), bool)
    for band_N in signatures_NB.T:
        _, first, group_N = np.unique(band_N, return_index=True, return_inverse=True)
        repeats_N |= first[group_N] < np.arange(len(band_N))
    return repeats_N


def groups(signatures_NB: UInt[np.ndarray, "N B"]) -> Int[np.ndarray, " N"]:
    """For each document the first one of its group: documents that agree in a band are in one group, transitively."""
    first_N = np.arange(len(signatures_NB))
    while True:
        before_N = first_N
        for band_N in signatures_NB.T:
            values, group_N = np.unique(band_N, return_inverse=True)
            lowest = np.full(len(values), len(first_N))
            np.minimum.at(lowest, group_N, first_N)
            first_N = lowest[group_N]
        first_N = first_N[first_N]  # which halves the length of chains
        if np.array_equal(before_N, first_N):
            return first_N


def _shingles(text: str) -> UInt[np.ndarray, " m"]:
    words = " ".join(text.casefold().split())
    data = np.frombuffer(f" {words}{' ' * _WIDTH}".encode(), np.uint8)
    starts_m = np.flatnonzero(data[:-_WIDTH] == ord(" ")) + 1
    parts_m3 = np.lib.stride_tricks.sliding_window_view(data, _WIDTH)[starts_m].view(np.uint64)
    return np.unique(mix_bits(mix_bits(mix_bits(parts_m3[:, 0]) + parts_m3[:, 1]) + parts_m3[:, 2]))


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return x ^ (x >> np.uint64(33))
