"""The code and the commands of README and docs work."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ANALYSIS = (ROOT / "docs" / "analysis.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for line in re.findall(r"^ltm (.*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("code", PYTHON)
def test_the_code_runs_and_learns(code):
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["model"].prior.mean.abs().max() > 0


def test_the_commands_run_in_order(corpus, run, ltm, tmp_path, monkeypatch):
    """Smaller than they say: on a corpus of sixteen tokens a sequence, for two steps."""
    (tmp_path / "corpus.jsonl").write_bytes(corpus.read_bytes())
    drinks = {"English": "tea is what number {} drinks", "French": "le thé est ce que boit le numéro {}"}
    texts = [{"language": name, "text": text.format(n)} for n in range(60) for name, text in drinks.items()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in texts), "utf-8")
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    monkeypatch.chdir(tmp_path)
    shorter = {
        "data": ["--val-fraction", "0.3", "--keep-together", "exact"],
        "context": ["--option", "trainer.max_steps=2", "--samples", "2"],
        "fit": ["--trainer.max_time", "null", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"],
        "evaluate": ["--limit", "2", "--samples", "1", "--fast-steps", "1"],
        "generate": ["--max-new-tokens", "4"],
    }
    assert [command[0] for command in COMMANDS] == [
        *("data", "context"),
        *("data", "fit", "evaluate", "generate", "flops"),
    ]
    for command in COMMANDS:
        code, _, err = ltm(*command, *shorter.get(command[0], []))
        assert code == 0, err


def test_the_code_of_the_analysis_runs_beside_what_the_command_wrote(run, ltm, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(run)
    (tmp_path / "texts.jsonl").write_text('{"text": "every"}\n')
    monkeypatch.chdir(tmp_path)
    assert ltm("posterior", "runs/first", "--input", "texts.jsonl", "--out", "posterior.nc", "--samples", 25)[0] == 0
    written, names = Path("posterior.nc").read_bytes(), {}
    stream = ("--out", "p.zarr", "--stream", "--samples", 25)
    assert ltm("posterior", "runs/first", "--input", "texts.jsonl", *stream)[0] == 0
    for code in re.findall(r"^```python\n(.*?)^```", ANALYSIS, re.DOTALL | re.MULTILINE):
        exec(compile(code, "analysis.md", "exec"), names)
    assert Path("posterior.nc").read_bytes() == written
    assert names["stored"].size == 1
    assert names["spread"].shape == names["posterior"].stats["mean"].shape[1:]
    assert names["posterior"].stats["layer"].values.tolist() == [1, 2]


def test_the_functions_of_the_analysis_are_there():
    table = ANALYSIS.split("## What do the thoughts say?")[1].split("##")[0]
    functions = re.findall(r"`([a-z]+)\.([a-z_]+)`", table)
    pictures = [("pictures.thoughts", name) for name in re.findall(r"`(plot_[a-z_]+)`", table)]
    assert len(functions) > 8
    assert len(pictures) > 4
    for module, name in [*functions, *pictures]:
        assert module == "stats" or hasattr(importlib.import_module(f"ltm_pyro.analysis.{module}"), name)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
