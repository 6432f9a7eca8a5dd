"""What scikit-learn does here: the classifier two-sample test, linear probes, and clusters.

Shapes: N examples, D features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.statistics import clustered_mean, clustered_ratio, standard_error

FOLDS = 5
SHUFFLES = 20  # of labels, for the clusters' null


class Accuracy(NamedTuple):
    """The share of held-out examples that are classified correctly, or R², and its standard error over documents."""

    mean: float
    stderr: float


class TwoSample(NamedTuple):
    """The classifier's accuracy on draws it has not seen, its standard error, and the p-value of "the same"."""

    mean: float
    stderr: float
    p_value: float


def c2st(a_ND: Float[np.ndarray, "n D"], b_ND: Float[np.ndarray, "m D"], seed: int = 0) -> TwoSample:
    """The classifier two-sample test: accuracy 0.5 if both sets have the same distribution, up to 1 if they differ.

    The classifier is a quadratic discriminant with shrunk covariances, optimal for two Gaussians. It learns from one
    half of the draws and is scored on the other, so that the number of right answers is binomial under the hypothesis
    (Lopez-Paz & Oquab 2017, arXiv 1610.06545); with cross-validation it is not, because folds share what they learn
    from. Draws within a set must be independent; `UsageError` if they are all equal.
    """
    size, draw = min(len(a_ND), len(b_ND)), np.random.default_rng(seed)
    half = size // 2
    x_ND = np.concatenate([draw.permutation(x_ND[:size]) for x_ND in (a_ND, b_ND)])
    y_N, learns_N = np.repeat([0, 1], size), np.tile(np.arange(size) < half, 2)
    # tol=0 because a very narrow set of draws has full rank too
    discriminant = QuadraticDiscriminantAnalysis(solver="eigen", shrinkage="auto", tol=0.0)
    classifier = make_pipeline(StandardScaler(), discriminant)
    try:
        classifier.fit(x_ND[learns_N], y_N[learns_N])
    except np.linalg.LinAlgError:
        raise UsageError(
            f"The {size} draws of one set do not vary, so no Gaussian fits them: use a guide other than Point."
        ) from None
    right_N = classifier.predict(x_ND[~learns_N]) == y_N[~learns_N]
    found = binomtest(int(right_N.sum()), len(right_N), 0.5, alternative="greater")
    return TwoSample(float(right_N.mean()), float(standard_error(right_N)), float(found.pvalue))


Groups = Any  # (N,), equal for the pieces of one document, which are never in training and test together


def linear_probe(x_ND: Any, y_N: Int[np.ndarray, " N"], groups_N: Groups) -> Accuracy:
    """Held-out accuracy of a logistic regression on standardised features; no group is in training and test."""
    return accuracy_of(linear_predictions(x_ND, y_N, groups_N) == y_N, groups_N)


def linear_predictions(x_ND: Any, y_N: Int[np.ndarray, " N"], groups_N: Groups) -> Int[np.ndarray, " N"]:
    """What the logistic regression of `linear_probe` says of every example when it is held out."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    return _held_out(model, x_ND, y_N, groups_N)


def bag_of_tokens(counts_NV: Any, y_N: Int[np.ndarray, " N"], groups_N: Groups) -> Accuracy:
    """Held-out accuracy of a logistic regression on TF-IDF weights of token counts."""
    model = make_pipeline(TfidfTransformer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    return accuracy_of(_held_out(model, counts_NV, y_N, groups_N) == y_N, groups_N)


def ridge_r2(x_ND: Any, y_N: Float[np.ndarray, " N"], groups_N: Groups) -> Accuracy:
    r"""Held-out R² of a ridge regression, and its standard error over groups.

    .. math:: R^2 = 1 - \sum_n (y_n - \hat y_n)^2 / \sum_n (y_n - \bar y)^2

    The penalty is chosen within the training folds. For token counts give their TF-IDF weights.
    """
    scale = [StandardScaler()] if isinstance(x_ND, np.ndarray) else []
    model = make_pipeline(*scale, RidgeCV(np.logspace(-2, 4, 7)))
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    predicted_N = cross_val_predict(model, x_ND, y_N, groups=groups_N, cv=folds)
    total_N = (y_N - y_N.mean()) ** 2
    found = clustered_ratio(total_N - (y_N - predicted_N) ** 2, total_N, groups_N)
    return Accuracy(found.value, found.stderr)


def accuracy_of(right_N: np.ndarray, groups_N: Groups) -> Accuracy:
    """The share of right answers, and its standard error over groups."""
    found = clustered_mean(right_N, groups_N)
    return Accuracy(found.value, found.stderr)


def _held_out(model: Any, x_ND: Any, y_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    return cross_val_predict(model, x_ND, y_N, groups=groups_N, cv=folds)


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
