import json
import random

import numpy as np
import pytest

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.duplicates import repeats, signature
from ltm_pyro.data.pack import pack

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
    names = [{n for row in PackedDataset.open(tmp_path / "out", s) for n, _ in row.documents} for s in ("train", "val")]
    assert not names[0] & names[1]
    if kind == "near":
        assert {int(name.split(":")[1]) % 20 for name in names[0]} & {
            int(n.split(":")[1]) % 20 for n in names[1]
        } == set()
