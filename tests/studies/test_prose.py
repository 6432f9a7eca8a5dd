"""The model of prose: its corpus, its yardstick, and the whole of it for a few seconds."""

import json
import math

import numpy as np
import pytest
import torch

from ltm_pyro.data import pack
from ltm_pyro.evaluation.evaluate import coarse_block
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies import prose

NATS = (
    "bound",
    "iwae",
    "prior",
    "reused_noise",
    "autoregressive",
    "unigram",
    "causal",
    "causal_prior",
    "predictive_gain",
    "predictive_gain_stderr",
    "bound_stderr",
    "above_autoregressive",
    "above_autoregressive_stderr",
)


@pytest.fixture
def float32():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.slow
def test_the_corpus_is_english_and_always_the_same():
    first, second = (dict(prose.corpus()) for _ in range(2))
    assert first == second
    assert len(first) > 500
    assert all(name.startswith(("topic ", "module ")) and text.strip() for name, text in first.items())
    assert sum(text.count(" the ") for text in first.values()) > 10_000


def test_unigram_counts_every_token_once_more_than_seen(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"{i} aab" for i in range(20)))
    pack([tmp_path / "text.txt"], tmp_path / "data", tokenizer="bpe:257", seq_len=4, val_fraction=0.3)
    splits = (prose.PackedDataset.open(tmp_path / "data", split) for split in ("train", "val"))
    train, val = (np.concatenate([row.tokens_T for row in map(s.__getitem__, range(len(s)))]) for s in splits)
    nats = [-math.log((1 + (train == token).sum()) / (len(train) + 257)) for token in val]
    assert prose.unigram(tmp_path / "data") == pytest.approx(np.mean(nats))


@pytest.mark.slow
def test_a_few_seconds_of_everything(float32, tmp_path, monkeypatch, capsys):
    options = ("--trainer.max_steps", "4", "--model.max_flops", "null", "--trainer.limit_val_batches", "1")
    logging = ("--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "2")
    monkeypatch.setattr("sys.argv", ["prose", "--out", str(tmp_path), *options, *logging])
    prose.main()
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    figures = (*NATS, "tokens_per_second", "train_seconds")
    assert set(summary) == {*figures, "documents", "tokens", "parameters", "samples", "continuation"}
    assert all(isinstance(summary[name], float) and math.isfinite(summary[name]) for name in figures)
    assert isinstance(summary["parameters"], int)
    assert len(summary["samples"]) == 3
    texts = [*summary["samples"], summary["continuation"]]
    assert not [text for text in texts if not isinstance(text, str) or "\N{REPLACEMENT CHARACTER}" in text]
    assert summary["continuation"].startswith(prose.PROMPT)
    block = coarse_block(load_run(tmp_path))  # of sequences of one block the gain is 0, and not counted
    lengths = [len(row.tokens_T) for row in prose.PackedDataset.open(tmp_path / "data", "val")]
    gain = (summary["causal_prior"] - summary["causal"]) * sum(lengths) / sum(n for n in lengths if n > block)
    assert summary["predictive_gain"] == pytest.approx(gain)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "predictive gain" in capsys.readouterr().out
