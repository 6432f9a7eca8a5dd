"""Clusters of the thoughts against a label: planted, absent, and with several sequences of a document."""

import numpy as np
import pytest

from ltm_pyro.analysis.classifiers import clusters
from ltm_pyro.errors import UsageError


def planted(distance, classes=("a", "b", "c"), documents=60, pieces=3):
    """Points, labels and documents; the label moves a point by a distance, in standard deviations."""
    rng = np.random.default_rng(0)
    class_N = (np.arange(documents) % len(classes)).repeat(pieces)
    x_ND = distance * np.eye(len(classes), 8)[class_N] + rng.normal(size=(documents * pieces, 8))
    return x_ND, [classes[k] for k in class_N], [f"text:{n}" for n in np.arange(documents).repeat(pieces)]


def test_planted_clusters_are_found():
    found = clusters(*planted(8.0))
    assert found.classes == ("a", "b", "c")
    assert found.adjusted_rand > 0.95
    assert abs(found.shuffled) < 0.1


def test_without_a_difference_the_agreement_is_that_of_shuffled_labels():
    found = clusters(*planted(0.0))
    assert abs(found.adjusted_rand) < 0.1
    assert abs(found.shuffled) < 0.1


def test_sequences_without_the_label_are_left_out():
    x_ND, labels, documents = planted(8.0)
    found = clusters(x_ND, [""] * 30 + labels[30:], documents)
    assert len(found.cluster_N) == 150
    assert found.adjusted_rand > 0.95


@pytest.mark.parametrize("labels", [["a"] * 6, [*"abcdef"], [""] * 6])
def test_what_has_no_classes_is_refused(labels):
    with pytest.raises(UsageError, match=r"A label with \d classes in \d sequences"):
        clusters(np.eye(6), labels, [*"123456"])
