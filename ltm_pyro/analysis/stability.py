"""Stability: is the geometry of the thoughts there again in a model that was trained from another seed?

Shapes: N documents, D coordinates.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.analysis.probes import means
from ltm_pyro.errors import UsageError

FEWEST = 20  # documents
FOLDS = 5
NEAREST = 10
CORRELATIONS = 5
PERMUTATIONS = 199


class Agreement(NamedTuple):
    """How much two posteriors of the same documents agree, up to a rotation of their thoughts.

    Args:
        r2: the share of the variance of one's means that the other's explain after rotation, reflection and a common
            scale (Procrustes), on documents that the rotation was not fitted to, averaged over both directions.
        correlations: held-out canonical correlations of the first five pairs of directions.
        neighbours: the share of a document's ten nearest documents that both agree on; ``by_chance`` is what unrelated
            thoughts share.
        null: ``r2`` of permuted documents; ``p_value`` is that of "no more than these" (one-sided, exact).
    """

    r2: float
    correlations: tuple[float, ...]
    neighbours: float
    by_chance: float
    null: Float[np.ndarray, " P"]
    p_value: float
    documents: int


def agreement(a: Posterior, b: Posterior, permutations: int = PERMUTATIONS, seed: int = 0) -> Agreement:
    """Compares the means of q of the same documents under two models, such as two seeds of one recipe.

    Thoughts have no names: a second training finds the same information in other directions, so that the two are
    aligned first. Alignment can find agreement where there is none; that is what held-out documents and the null of
    permuted documents are for. Of each document its first sequence counts. `UsageError` for other documents, or fewer
    than twenty.
    """
    if permutations < 19:
        raise UsageError(f"{permutations} permutations have no p-value of 0.05: give at least 19.")
    index_of = {name: int(n) for name, n in zip(*np.unique(b.documents, return_index=True), strict=True)}
    names, first_N = np.unique(a.documents, return_index=True)
    if missing := [str(name) for name in names if name not in index_of]:
        raise UsageError(f"The second posterior does not have document {missing[0]}: infer both from the same texts.")
    if len(names) < FEWEST:
        raise UsageError(f"An agreement needs at least {FEWEST} documents, got {len(names)}: infer from more texts.")
    if a.has(TEXT) and b.has(TEXT):
        ours, theirs = a.texts, b.texts
        if other := [name for name, n in zip(names, first_N, strict=True) if ours[n] != theirs[index_of[name]]]:
            raise UsageError(f"Document {other[0]} has another text in each posterior: infer both from the same texts.")
    a_ND, b_ND = means(a)[first_N], means(b)[[index_of[name] for name in names]]
    random, count = np.random.default_rng(seed), len(names)
    fold_N = random.permutation(count) % FOLDS
    r2 = _both_ways(a_ND, b_ND, fold_N)
    null = np.array([_both_ways(a_ND, b_ND[random.permutation(count)], fold_N) for _ in range(permutations)])
    nearest = min(NEAREST, count - 2)
    shared = [len({*x} & {*y}) for x, y in zip(nearest_rows(a_ND, nearest), nearest_rows(b_ND, nearest), strict=True)]
    return Agreement(
        r2=r2,
        correlations=tuple(_canonical(a_ND, b_ND, fold_N).tolist()),
        neighbours=float(np.mean(shared)) / nearest,
        by_chance=nearest / (count - 1),
        null=null,
        p_value=float((1 + (null >= r2).sum()) / (1 + permutations)),
        documents=count,
    )


def procrustes(
    from_ND: Float[np.ndarray, "N D"], to_NE: Float[np.ndarray, "N E"]
) -> tuple[Float[np.ndarray, "D E"], Float[np.ndarray, " D"], Float[np.ndarray, " E"]]:
    r"""The orthogonal map R and the scale s that minimise Σ ‖y − ȳ − s (x − x̄) R‖² (Schönemann 1966).

    Returns:
        s R, x̄ and ȳ.
    """
    center_D, center_E = from_ND.mean(0), to_NE.mean(0)
    left, singular, right = np.linalg.svd((from_ND - center_D).T @ (to_NE - center_E), full_matrices=False)
    total = ((from_ND - center_D) ** 2).sum()
    return left @ right * (singular.sum() / total if total else 0.0), center_D, center_E


def _held_out_r2(from_ND: np.ndarray, to_NE: np.ndarray, fold_N: Int[np.ndarray, " N"]) -> float:
    left, total = 0.0, 0.0
    for fold in range(FOLDS):
        test_N = fold_N == fold
        map_DE, center_D, center_E = procrustes(from_ND[~test_N], to_NE[~test_N])
        left += ((to_NE[test_N] - center_E - (from_ND[test_N] - center_D) @ map_DE) ** 2).sum()
        total += ((to_NE[test_N] - center_E) ** 2).sum()
    return float(1 - left / total) if total else 0.0


def _both_ways(a_ND: np.ndarray, b_NE: np.ndarray, fold_N: np.ndarray) -> float:
    return (_held_out_r2(a_ND, b_NE, fold_N) + _held_out_r2(b_NE, a_ND, fold_N)) / 2


def _canonical(a_ND: np.ndarray, b_NE: np.ndarray, fold_N: np.ndarray) -> Float[np.ndarray, " C"]:
    """Canonical correlations on held-out documents, of principal components that the others can support."""
    found = []
    for fold in range(FOLDS):
        test_N = fold_N == fold
        scores = []
        for x in (a_ND, b_NE):
            center = x[~test_N].mean(0)
            _, singular, right = np.linalg.svd(x[~test_N] - center, full_matrices=False)
            kept = min(int((singular > 1e-9 * singular[0]).sum()), int((~test_N).sum()) // 10 + 1)
            whitened = right[:kept].T / singular[:kept]
            scores.append(((x[~test_N] - center) @ whitened, (x[test_N] - center) @ whitened))
        (train_a, test_a), (train_b, test_b) = scores
        left, _, right = np.linalg.svd(train_a.T @ train_b, full_matrices=False)
        u, v = test_a @ left, test_b @ right.T
        size = min(CORRELATIONS, u.shape[1])
        found.append([np.corrcoef(u[:, n], v[:, n])[0, 1] for n in range(size)])
    size = min(map(len, found))
    return np.array([row[:size] for row in found]).mean(0)


def nearest_rows(x_ND: np.ndarray, count: int) -> Int[np.ndarray, "N n"]:
    """The rows that are nearest to each row, itself left out, the nearest first."""
    squares_N = (x_ND**2).sum(1)
    distance_NN = squares_N[:, None] + squares_N - 2 * x_ND @ x_ND.T
    np.fill_diagonal(distance_NN, np.inf)
    return distance_NN.argsort(1, kind="stable")[:, :count]
