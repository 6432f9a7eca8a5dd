"""MAUVE: the divergence of two sets of texts in a feature space (Pillutla et al. 2021, arXiv 2102.01454).

Shapes: N, M texts, F features, C clusters.
"""

import numpy as np
from jaxtyping import Float

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.extras import extra

SCALE = 5.0  # c in the paper
MIXTURES = 100  # points of the frontier
VARIANCE = 0.9  # share of the features' variance that PCA keeps


def mauve(p_NF: Float[np.ndarray, "N F"], q_MF: Float[np.ndarray, "M F"], seed: int = 0) -> float:
    r"""The area under the divergence frontier of two histograms over common clusters, between 0 and 1.

    .. math:: (e^{-c \, \mathrm{KL}(Q \| R)}, e^{-c \, \mathrm{KL}(P \| R)}), \qquad
        R = \lambda P + (1 - \lambda) Q, \quad 0 < \lambda < 1, \quad c = 5

    The features are scaled to length 1, reduced by PCA to 90 % of their variance, and clustered by k-means, with a
    tenth as many clusters as texts. Raises `UsageError` for fewer than two texts on a side.
    """
    if min(len(p_NF), len(q_MF)) < 2:
        raise UsageError(f"MAUVE compares sets of at least two texts, got {len(p_NF)} and {len(q_MF)}: give more.")
    P_C, Q_C = histograms(p_NF, q_MF, seed)
    return frontier_area(P_C, Q_C)


def histograms(
    p_NF: Float[np.ndarray, "N F"], q_MF: Float[np.ndarray, "M F"], seed: int = 0
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The share of each set's texts in every cluster; both sets are clustered together."""
    cluster, decomposition = (extra(f"sklearn.{part}", "suites", "MAUVE") for part in ("cluster", "decomposition"))
    both = np.concatenate([p_NF, q_MF])
    both = both / np.linalg.norm(both, axis=1, keepdims=True).clip(1e-12)
    different = len(np.unique(both, axis=0))
    if different == 1:  # nothing to cluster by
        return np.ones(1), np.ones(1)
    clusters = min(max(2, round(min(len(p_NF), len(q_MF)) / 10)), different)
    reduced = decomposition.PCA(n_components=VARIANCE, svd_solver="full").fit_transform(both)
    labels = cluster.KMeans(clusters, n_init=5, random_state=seed).fit_predict(reduced)
    counts = (np.bincount(part, minlength=clusters) for part in (labels[: len(p_NF)], labels[len(p_NF) :]))
    P_C, Q_C = (count / count.sum() for count in counts)
    return P_C, Q_C


def frontier_area(P_C: Float[np.ndarray, " C"], Q_C: Float[np.ndarray, " C"]) -> float:
    """The area under the divergence frontier of two distributions over C outcomes."""
    points = [(0.0, 1.0)]
    for weight in np.linspace(1, 0, MIXTURES + 2)[1:-1]:  # R goes from P to Q
        R_C = weight * P_C + (1 - weight) * Q_C
        points.append((np.exp(-SCALE * _kl(Q_C, R_C)), np.exp(-SCALE * _kl(P_C, R_C))))
    points.append((1.0, 0.0))
    x, y = np.array(points).T
    return float(np.trapezoid(y, x))


def _kl(p_C: np.ndarray, r_C: np.ndarray) -> float:
    """Σ p log(p / r) in nats; r is positive where p is."""
    own = p_C > 0
    return float((p_C[own] * np.log(p_C[own] / r_C[own])).sum())
