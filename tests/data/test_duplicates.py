import json
import random
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.duplicates import groups, repeats, signature
from ltm_pyro.data.manifest import SPLITS, read_manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.errors import UsageError

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 8)) for i in range(500)]


def text(seed, words=300):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original, share, seed=0):
    """The text with some of its words exchanged."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in original.split())


def test_repeats_are_those_after_the_first():
    signatures_NB = np.array([[1, 2], [3, 4], [1, 9], [7, 4], [8, 8]], np.uint64)
    assert repeats(signatures_NB).tolist() == [False, False, True, True, False]
    assert repeats(signatures_NB[:, :0]).tolist() == [False] * 5


def test_near_duplicates_meet_and_others_do_not():
    originals = [text(i) for i in range(40)]
    near = [changed(x, 0.01, i) for i, x in enumerate(originals)]
    far = [changed(x, 0.5, i) for i, x in enumerate(originals)]

    def meet(first, second):
        pairs = zip(map(signature, first), map(signature, second), strict=True)
        return sum(bool((a == b).any()) for a, b in pairs)

    assert meet(originals, [f"  {x.upper()}\n" for x in originals]) == 40
    assert meet(originals, near) >= 38
    assert meet(originals, far) == 0
    assert meet(originals, originals[1:] + originals[:1]) == 0
    assert len({tuple(signature(x).tolist()) for x in ("", "a", "b", "short text")}) == 4


@pytest.mark.parametrize(("kind", "left"), [(None, 60), ("exact", 40), ("near", 20)])
def test_only_the_first_of_several_stays(tmp_path, kind, left):
    originals = [text(i) for i in range(20)]
    everything = originals + originals[::-1] + [changed(x, 0.01) for x in originals]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in everything))
    manifest = pack([path], tmp_path / "out", tokenizer="bpe:300", seq_len=32, val_fraction=0.3, drop_duplicates=kind)
    assert sum(split.documents for split in manifest.splits.values()) == left
    assert manifest.dropped == 60 - left
    numbers = [{row.parts[0].number for row in PackedDataset.open(tmp_path / "out", split)} for split in SPLITS[:3]]
    where = [{(min(n, 39 - n) if n < 40 else n - 40) for n in found} for found in numbers]  # the original of each
    assert sum(map(len, where)) == 20 == len(set.union(*where))


def test_groups_are_transitive():
    signatures_NB = np.array([[1, 2], [3, 4], [1, 9], [7, 9], [8, 8], [7, 4]], np.uint64)
    assert groups(signatures_NB).tolist() == [0, 0, 0, 0, 4, 0]


@given(st.lists(st.integers(0, 30), min_size=3, max_size=40), st.integers(0, 5))
@settings(max_examples=25)
def test_no_document_and_no_near_duplicate_is_in_two_splits(numbers, seed):
    """Repeated texts are the same up to a word; what agrees in a band of the signature is on one side."""
    texts = [changed(text(n, 60), 0.02, i) for i, n in enumerate(numbers)]
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no document is in test")  # of two groups
        path = Path(folder, "a.jsonl")
        path.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
        fractions = {"val_fraction": 0.3, "test_fraction": 0.2, "seed": seed}
        marks = np.stack([signature(x) for x in texts])
        if not groups(marks).any():
            with pytest.raises(UsageError, match="are the same or similar"):
                pack([path], Path(folder, "out"), tokenizer="bpe:257", seq_len=64, **fractions)
            return
        pack([path], Path(folder, "out"), tokenizer="bpe:257", seq_len=64, **fractions)
        side = {}
        for split in read_manifest(Path(folder, "out")).splits:
            for row in PackedDataset.open(Path(folder, "out"), split):
                assert side.setdefault(row.parts[0].number, split) == split
    assert len(side) == len(texts)
    meet_NN = (marks[:, None] == marks).any(-1)
    assert all(side[a] == side[b] for a, b in np.argwhere(meet_NN).tolist())
