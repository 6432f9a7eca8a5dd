"""Linear probes that predict labels from the thoughts, and nearest neighbours.

Shapes: N sequences, D coordinates, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from ltm_pyro.analysis.classifiers import (
    FOLDS,
    Accuracy,
    accuracy_of,
    bag_of_tokens,
    linear_predictions,
    linear_probe,
    ridge_r2,
)
from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.data.documents import Label
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.statistics import clustered_mean


class Probe(NamedTuple):
    """Held-out accuracies of the probes of one label, the share of its largest class, and what was left out.

    ``missing`` sequences have no value of the label; classes with too few documents are ``too_rare``.
    """

    label: str
    classes: tuple[Label, ...]
    sequences: int
    thoughts: Accuracy
    tokens: Accuracy
    majority: float
    too_rare: tuple[Label, ...]
    missing: int


class Regression(NamedTuple):
    """Held-out R² of the regressions of a label that is a number; ``missing`` sequences have no value of it."""

    label: str
    sequences: int
    thoughts: Accuracy
    tokens: Accuracy
    missing: int


class _Classes(NamedTuple):
    """A label's classes with five documents or more: which sequences have one, and which class and document it is."""

    classes: tuple[Label, ...]
    too_rare: tuple[Label, ...]
    kept_N: np.ndarray
    y_n: np.ndarray
    groups_n: np.ndarray


def probe(posterior: Posterior, label: str, features_ND: np.ndarray | None = None) -> Probe:
    """Predicts a label's classes from the means of q and, for comparison, from the bag of tokens.

    Logistic regression with five-fold cross-validation; all sequences of a document are in the same fold. Classes with
    fewer than five documents are left out, and so are sequences without a value.

    Args:
        features_ND: what is used in place of the means of q.
    """
    classes, too_rare, kept_N, y_n, groups_n = _classes(posterior, label)
    return Probe(
        label=label,
        classes=classes,
        sequences=len(y_n),
        thoughts=linear_probe((means(posterior) if features_ND is None else features_ND)[kept_N], y_n, groups_n),
        tokens=bag_of_tokens(token_counts(posterior)[kept_N], y_n, groups_n),
        majority=max(Counter(y_n.tolist()).values()) / len(y_n),
        too_rare=too_rare,
        missing=_values(posterior, label).count(None),
    )


def shuffled_probe(posterior: Posterior, label: str, shuffles: int = 19, seed: int = 0) -> np.ndarray:
    """The accuracies of `probe` with the thoughts of other sequences: chance beats 19 of them in 1 of 20 cases."""
    _, _, kept_N, y_n, groups_n = _classes(posterior, label)
    random, means_nD = np.random.default_rng(seed), means(posterior)[kept_N]
    return np.array([linear_probe(random.permutation(means_nD), y_n, groups_n).mean for _ in range(shuffles)])


def regress(posterior: Posterior, label: str) -> Regression:
    """Predicts a label that is a number from the means of q and, for comparison, from the bag of tokens.

    Ridge regression with five-fold cross-validation; all sequences of a document are in the same fold.
    """
    values = _values(posterior, label)
    if label not in numeric_labels(posterior):
        raise UsageError(
            f"The label {label!r} is no number with {2 * FOLDS} documents and several values: use a probe of classes."
        )
    kept_N = np.array([x is not None for x in values])
    y_n, groups_n = np.array([x for x in values if x is not None], float), _numbered(posterior.documents[kept_N])
    counts_NV = TfidfTransformer(sublinear_tf=True).fit_transform(token_counts(posterior)[kept_N])
    return Regression(
        label=label,
        sequences=len(y_n),
        thoughts=ridge_r2(means(posterior)[kept_N], y_n, groups_n),
        tokens=ridge_r2(counts_NV, y_n, groups_n),
        missing=int((~kept_N).sum()),
    )


def probe_thoughts(posterior: Posterior, label: str) -> xr.Dataset:
    """Predicts a label from each thought alone: ``accuracy`` and ``p_value`` by layer and thought.

    The p-value is that of "no more right answers than the largest class gives" (one-sided, errors over documents),
    corrected for the number of thoughts by Holm's method: one below 0.05 anywhere is a finding at 5 %.
    """
    _, _, kept_N, y_n, groups_n = _classes(posterior, label)
    mean = posterior.stats["mean"].transpose("sequence", "layer", "thought", "dim")
    by_chance_n = y_n == Counter(y_n.tolist()).most_common(1)[0][0]
    accuracy, p_value = (np.empty(mean.shape[1:3]) for _ in range(2))
    for place in np.ndindex(accuracy.shape):
        right_n = linear_predictions(mean.values[(kept_N, *place)], y_n, groups_n) == y_n
        better = clustered_mean(right_n.astype(float) - by_chance_n, groups_n)
        accuracy[place] = accuracy_of(right_n, groups_n).mean
        p_value[place] = better.p_value / 2 if better.value > 0 else 1 - better.p_value / 2
    axes, places = ("layer", "thought"), {name: mean.coords[name] for name in ("layer", "thought")}
    return xr.Dataset({"accuracy": (axes, accuracy), "p_value": (axes, holm(p_value))}, places)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values of several hypotheses, corrected for their number (Holm 1979), in the shape they came in."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")
    corrected = np.empty(flat.size)
    corrected[order] = np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)).clip(max=1)
    return corrected.reshape(p_values.shape)


def probable_labels(posterior: Posterior) -> list[str]:
    """The labels that `probe` accepts: at least two classes with five documents each."""
    found = []
    for label in posterior.labels:
        if label != "document" and sum(n >= FOLDS for n in _documents_of(posterior, label).values()) >= 2:
            found.append(label)
    return found


def numeric_labels(posterior: Posterior) -> list[str]:
    """The labels that `regress` accepts: numbers of at least ten documents, of which more than two are different."""
    found = []
    for label in posterior.labels:
        values = _values(posterior, label)
        known = [(x, d) for x, d in zip(values, posterior.documents.tolist(), strict=True) if x is not None]
        numbers = bool(known) and all(isinstance(x, int | float) for x, _ in known)
        if numbers and len({x for x, _ in known}) > 2 and len({d for _, d in known}) >= 2 * FOLDS:
            found.append(label)
    return found


def means(posterior: Posterior) -> np.ndarray:
    """The means of q: (N, D)."""
    return posterior.stats["mean"].values.reshape(posterior.size, -1)


def _values(posterior: Posterior, label: str) -> list[Label]:
    if label not in posterior.labels:
        raise UsageError(f"There is no label {label!r}: the labels are {', '.join(posterior.labels)}.")
    return posterior.labels[label]


def _documents_of(posterior: Posterior, label: str) -> Counter[Label]:
    """The number of documents of each class, in the order of their names."""
    pairs = {*zip(_values(posterior, label), posterior.documents.tolist(), strict=True)}
    found = Counter(value for value, _ in pairs if value is not None)
    return Counter({value: found[value] for value in sorted(found, key=lambda x: (isinstance(x, str), x))})


def _classes(posterior: Posterior, label: str) -> _Classes:
    counts = _documents_of(posterior, label)
    classes = tuple(name for name, count in counts.items() if count >= FOLDS)
    if len(classes) < 2:
        raise UsageError(f"The label {label!r} has fewer than two classes of {FOLDS} documents: infer from more texts.")
    number = {name: n for n, name in enumerate(classes)}
    class_N = np.array([number.get(x, -1) for x in _values(posterior, label)])
    kept_N = class_N >= 0
    rare = tuple(name for name in counts if name not in number)
    return _Classes(classes, rare, kept_N, class_N[kept_N], _numbered(posterior.documents[kept_N]))


def _numbered(names: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1]


def token_counts(posterior: Posterior) -> csr_matrix:
    """How often each token occurs in each sequence: (N, V)."""
    tokens_NT = posterior.group(TEXT)["tokens"].values
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
