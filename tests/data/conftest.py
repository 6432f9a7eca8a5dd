import json

import pytest

from ltm_pyro.data.pack import pack

TEXTS = [
    f"Story {i}: the cat\u2019s {i * 7} lives, naïve caf\u00e9 \U0001f600 <|endoftext|>\n\tend {i % 5}."
    for i in range(60)
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in TEXTS), "utf-8")
    return path


@pytest.fixture(scope="session")
def packed(corpus, tmp_path_factory):
    """A pack of the corpus, several shards a split; not to be changed."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltm_pyro.data.shards.BLOCK", 8)  # several samples a shard
        pack([corpus], out, tokenizer="bpe:300", seq_len=16, val_fraction=0.2, test_fraction=0.1, shard_rows=20)
    return out
