"""Names with rich markup or without valid UTF-8 are printed as they are, and every command accepts them."""

import json
import os
import shutil

import pytest


@pytest.mark.parametrize("name", ["[bold]x", "x[", ":cat:", os.fsdecode(b"x\xff")])
def test_every_command_takes_and_prints_it(name, corpus, recipe, ltm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(f"{name}/]")  # a closing tag
    text, pack, run, shared = (f"{name}/]/{part}" for part in ("text.jsonl", "pack", "run", "shared"))
    shutil.copy(corpus, text)
    shown = name.encode("utf-8", "backslashreplace").decode()
    quick = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    scored = ("--limit", 2, "--samples", 1, "--fast-steps", 1)
    commands = (
        ("data", "pack", text, "--out", pack, "--tokenizer", "bpe:280", "--seq-len", 16),
        ("data", "show", pack, "--samples", 1),
        ("data", "verify", pack),
        ("fit", "--config", recipe, "--data.directory", pack, "--run", run, *quick),
        ("evaluate", run, *scored),
        ("evaluate", run, "--suite", "zero-shot", "--source", f"ptb={text}", *scored),
    )
    share = (("export", run, "--out", shared), ("evaluate", shared, *scored))
    for command in (*commands, *share):  # safetensors itself opens only UTF-8 paths
        code, out, err = ltm(*command)
        assert code == 0, err
        assert f"{shown}/]/" in out + err, command


def test_json_says_them_so_that_they_are_read_again(corpus, ltm, tmp_path):
    name = os.fsdecode(b"x\xff.jsonl")
    shutil.copy(corpus, tmp_path / name)
    assert ltm("data", "pack", tmp_path / name, "--out", tmp_path / "pack", "--tokenizer", "bpe:280")[0] == 0
    code, out, err = ltm("data", "show", tmp_path / "pack", "--json")
    assert code == 0, err
    assert name in json.loads(out)["sources"]
