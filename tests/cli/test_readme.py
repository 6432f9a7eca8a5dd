"""What the README says, works."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for line in re.findall(r"^ltm (.*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("code", PYTHON)
def test_the_code_runs_and_learns(code):
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["model"].prior.mean.abs().max() > 0


def test_the_commands_run_in_order(corpus, run, ltm, tmp_path, monkeypatch):
    """Five commands, smaller than they say: on a corpus of sixteen tokens a sequence, for two steps."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "corpus.jsonl").write_bytes(corpus.read_bytes())
    (tmp_path / "studies").symlink_to(root / "studies")
    monkeypatch.chdir(tmp_path)
    shorter = {
        "fit": ["--trainer.max_time", "null", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"],
        "evaluate": ["--limit", "2", "--samples", "1", "--fast-steps", "1"],
        "generate": ["--max-new-tokens", "4"],
    }
    assert [command[0] for command in COMMANDS] == ["data", "fit", "evaluate", "generate", "flops"]
    for command in COMMANDS:
        code, _, err = ltm(*command, *shorter.get(command[0], []))
        assert code == 0, err


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parents[2]
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert not [link for link in links if not link.startswith("https://") and not (root / link).exists()]
