"""Linear probes that predict labels from the thoughts, and nearest neighbours.

Shapes: N sequences, D coordinates, V vocabulary.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from ltm_pyro.analysis.classifiers import FOLDS, Accuracy, bag_of_tokens, linear_probe
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.errors import UsageError


class Probe(NamedTuple):
    """Held-out accuracies of the probes of one label, the share of its largest class, and the classes left out."""

    label: str
    classes: tuple[str, ...]
    sequences: int
    thoughts: Accuracy
    tokens: Accuracy
    majority: float
    too_rare: tuple[str, ...]


def probe(posterior: Posterior, label: str) -> Probe:
    """Predicts a label from the means of q and, for comparison, from the bag of tokens.

    Logistic regression with five-fold cross-validation; all sequences of a document are in the same fold. Classes with
    fewer than five documents are left out.
    """
    if label not in posterior.labels:
        raise UsageError(f"There is no label {label!r}: the labels are {', '.join(posterior.labels)}.")
    values, documents = np.array(posterior.labels[label]), np.array(posterior.labels["document"])
    of_class = {name: len({*documents[values == name]}) for name in sorted({*values.tolist()} - {""})}
    classes = tuple(name for name, count in of_class.items() if count >= FOLDS)
    if len(classes) < 2:
        raise UsageError(f"The label {label!r} has fewer than two classes of {FOLDS} documents: infer from more texts.")
    kept = np.isin(values, classes)
    y_N = np.searchsorted(classes, values[kept])
    groups_N = np.unique(documents[kept], return_inverse=True)[1]
    means_ND = posterior.stats["mean"].values[kept].reshape(kept.sum(), -1)
    return Probe(
        label=label,
        classes=classes,
        sequences=int(kept.sum()),
        thoughts=linear_probe(means_ND, y_N, groups_N),
        tokens=bag_of_tokens(token_counts(posterior)[kept], y_N, groups_N),
        majority=max(Counter(y_N.tolist()).values()) / len(y_N),
        too_rare=tuple(name for name in of_class if name not in classes),
    )


def probable_labels(posterior: Posterior) -> list[str]:
    """The labels that `probe` accepts: at least two classes with five documents each."""
    found = []
    for label in posterior.labels:
        documents = np.array(posterior.labels["document"])
        counts = Counter(
            value for value, _ in {*zip(posterior.labels[label], documents.tolist(), strict=True)} if value
        )
        if label != "document" and sum(count >= FOLDS for count in counts.values()) >= 2:
            found.append(label)
    return found


def token_counts(posterior: Posterior) -> csr_matrix:
    """How often each token occurs in each sequence: (N, V)."""
    tokens_NT = posterior.group("observed_data")["tokens"].values
    row, column = np.nonzero(tokens_NT >= 0)
    shape = (len(tokens_NT), int(tokens_NT.max()) + 1)
    return csr_matrix((np.ones(len(row)), (row, tokens_NT[row, column])), shape)


class Neighbour(NamedTuple):
    """A sequence and the distance of the mean of its q, in prior standard deviations."""

    sequence: int
    distance: float


def neighbours(posterior: Posterior, sequence: int, count: int = 5) -> list[Neighbour]:
    """The sequences whose means of q have the smallest Euclidean distance, coordinates scaled by the prior."""
    if not 0 <= sequence < posterior.size:
        raise UsageError(f"There is no sequence {sequence}: they are numbered from 0 to {posterior.size - 1}.")
    scale = posterior.group("prior")["z"].std(("chain", "draw")).values
    means_ND = (posterior.stats["mean"].values / scale).reshape(posterior.size, -1)
    distance_N: Any = np.linalg.norm(means_ND - means_ND[sequence], axis=1)
    nearest = [int(index) for index in distance_N.argsort(kind="stable") if index != sequence]
    return [Neighbour(index, float(distance_N[index])) for index in nearest[:count]]
