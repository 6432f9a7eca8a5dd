"""Sequences of a generator: what was packed comes back with its exact figure, one per row."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.manifest import SPLITS
from ltm_pyro.data.sequences import pack_sequences
from ltm_pyro.errors import UsageError


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=3, max_size=30))
def test_sequences_come_back_with_what_is_known_of_them(tmp_path_factory, sequences):
    assume(len({*map(tuple, sequences)}) > 1)
    out = tmp_path_factory.mktemp("x") / "pack"
    nats, labels = [0.5 * n for n in range(len(sequences))], {"odd": [n % 2 == 1 for n in range(len(sequences))]}
    manifest = pack_sequences(sequences, out, 9, exact_nats=nats, labels=labels, val_fraction=0.3, test_fraction=0.3)
    assert (manifest.vocabulary, manifest.exact, manifest.labels["odd"].values) == (10, True, (False, True))
    back = {}
    for split in manifest.splits:
        dataset = PackedDataset.open(out, split)
        for row in dataset:
            (part,) = row.parts
            back[part.number] = row.tokens_T.tolist()
            assert part.document.exact_nats == nats[part.number]
            assert part.document.labels == {"odd": part.number % 2 == 1}
        text = dataset.tokenizer.decode(dataset[0].tokens_T.tolist())
        assert dataset.tokenizer.encode(text).ids == dataset[0].tokens_T.tolist()
    assert [back[n] for n in range(len(sequences))] == sequences
    where = [{tuple(row.tokens_T.tolist()) for row in PackedDataset.open(out, split)} for split in manifest.splits]
    assert sum(map(len, where)) == len(set.union(*where))  # equal sequences are in one split


REFUSED = [
    ({"sequences": [[0], [9]]}, "Sequence 1 has a token outside of 0 to 8."),
    ({"sequences": [[0], []]}, "Sequence 1 is no list of at least one whole number."),
    ({"sequences": np.array([[0.5], [1.0]])}, "Sequence 0 is no list of at least one whole number."),
    ({"exact_nats": [1.0]}, "There are 2 sequences, but {'exact_nats': 1} values: give one value per sequence."),
    ({"prompts": [0, 1]}, "Sequence 1 has 1 tokens and a prompt of 1: leave one to score."),
    ({"splits": ["train", "tset"]}, "There is no split 'tset': choose from train, val, test, harder, or None."),
    ({"exact_nats": [1.0, np.inf]}, "exact_nats has a value that is not finite"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_sequences_that_cannot_be_packed_are_refused(tmp_path, change, message):
    settings = {"sequences": [[0], [1]], "out": tmp_path / "out", "vocabulary": 9} | change
    with pytest.raises(UsageError, match=re.escape(message)):
        pack_sequences(**settings)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_named(tmp_path):
    given = [None] * 25 + ["harder"] * 5
    manifest = pack_sequences(np.arange(90).reshape(30, 3), tmp_path / "out", 90, splits=given)
    assert tuple(manifest.splits) == SPLITS
    rows = PackedDataset.open(tmp_path / "out", "harder")
    assert [row.tokens_T[0] for row in rows] == [75, 78, 81, 84, 87]
