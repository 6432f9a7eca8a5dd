"""lm-evaluation-harness on a run, through its own command line; it is installed apart, because it has 60 packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
TASK = """
task: tiny_news
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} It is about"
doc_to_choice: ["time", "people"]
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
---
task: tiny_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.rsplit(' ', 1)[0]}}}}"
doc_to_target: "{{{{text.rsplit(' ', 1)[1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
---
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
---
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "day"
generation_kwargs: {{until: ["."], max_gen_toks: 5}}
metric_list:
  - {{metric: exact_match}}
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the harness, and with what its model for Hugging Face needs besides torch and transformers."""
    folder = tmp_path_factory.mktemp("packages")
    install = ("-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", "--target", folder)
    subprocess.run([sys.executable, *install, "lm-eval==0.4.13"], check=True)
    subprocess.run([sys.executable, *install, "--no-deps", "accelerate==1.15.0", "psutil==7.2.2"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_requests_are_handled_as_by_its_own_model(packages):
    """The tests that are skipped where the harness is not installed."""
    tests = ("tests/evaluation/test_lm_eval.py", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    found = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert "skipped" not in found.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_command_line_knows_our_runs(run, packages, tmp_path):
    data = tmp_path / "news.jsonl"
    rows = [
        {"text": f"the old {word} reads of time", "label": i % 2} for i, word in enumerate(("day", "model", "text"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for text in TASK.format(data=data).split("---"):
        (tasks / f"{text.split()[1]}.yaml").write_text(text)
    names = "tiny_news,tiny_lambada,tiny_text,tiny_writing"
    options = ("--tasks", names, "--include_path", tasks, "--output_path", tmp_path / "out", "--batch_size", "auto")
    model = ("run", "--model", "ltm_pyro", "--model_args", f"run={run},samples=2")
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def command_line(*arguments):
        command = [sys.executable, "-P", "-m", "ltm_pyro.evaluation.lm_eval", *arguments]
        env = {**os.environ, **offline, "PYTHONPATH": str(packages)}
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)

    found = command_line(*model, *options)
    assert found.returncode == 0, found.stderr[-3000:]
    assert torch.cuda.is_available() or "There is no CUDA device for cuda:0" in found.stderr
    misspelt = command_line(*model[:-1], f"run={run},sampels=2", *options)
    assert misspelt.returncode == 2
    assert misspelt.stderr.splitlines()[-1].startswith("error: --model_args has no sampels; did you mean samples:")
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert set(results) == set(names.split(","))
    assert 0 <= results["tiny_news"]["acc,none"] <= 1
    assert results["tiny_lambada"]["perplexity,none"] > 1
    assert 0 < results["tiny_text"]["bits_per_byte,none"] < 20
