"""Clusters of the thoughts, found without labels and compared with a label afterwards.

Shapes: N sequences, D coordinates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from ltm_pyro.errors import UsageError

SHUFFLES = 20


class Clusters(NamedTuple):
    """As many clusters as a label has classes, and how well they agree with it.

    ``adjusted_rand`` is 1 if the clusters are the classes and 0 on average if they have nothing to do with each other
    (Hubert & Arabie 1985); ``shuffled`` is its mean over labels that were shuffled among documents.
    """

    classes: tuple[str, ...]
    cluster_N: Int[np.ndarray, " N"]
    adjusted_rand: float
    shuffled: float


def clusters(
    x_ND: Float[np.ndarray, "N D"], labels_N: Sequence[str], documents_N: Sequence[str], seed: int = 0
) -> Clusters:
    """k-means on standardised coordinates, the best of 20 starts, with as many clusters as there are classes.

    Args:
        x_ND: such as the means of q.
        labels_N: of each sequence; those with an empty one are left out. No cluster is told of them.
        documents_N: whose label each sequence has.

    Raises:
        UsageError: there are fewer than two classes, or no more sequences than classes.
    """
    values, documents = np.array(labels_N), np.array(documents_N)
    kept = values != ""
    values, documents = values[kept], documents[kept]
    classes = tuple(sorted({*values.tolist()}))
    if not 2 <= len(classes) < len(values):
        raise UsageError(
            f"A label with {len(classes)} classes in {len(values)} sequences has no clusters to compare with: it needs "
            f"two classes, and more sequences than classes."
        )
    k_means = KMeans(len(classes), n_init=20, random_state=seed)
    cluster_N = k_means.fit_predict(StandardScaler().fit_transform(x_ND[kept]))
    first_N, document_N = np.unique(documents, return_index=True, return_inverse=True)[1:]
    of_document, rng = values[first_N], np.random.default_rng(seed)
    shuffled = [adjusted_rand_score(rng.permutation(of_document)[document_N], cluster_N) for _ in range(SHUFFLES)]
    agreement = float(adjusted_rand_score(values, cluster_N))
    return Clusters(classes, cluster_N, agreement, float(np.mean(shuffled)))
