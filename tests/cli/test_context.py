"""`ltm evaluate RUN --floor … --ceiling …`: the context recovered."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ltm_pyro.studies.configure import as_options
from ltm_pyro.studies.context import ceiling, floor


def test_evaluate_prints_it_between_a_floor_and_a_ceiling(recipe, run, ltm, refused, tmp_path):
    decoder = yaml.safe_load(recipe.read_text())["model"]["decoder"]["init_args"]
    for name, settings in (("floor", floor(decoder)), ("ceiling", ceiling(decoder))):
        code, _, err = ltm("fit", "--config", recipe, "--run", tmp_path / name, *as_options(settings))
        assert code == 0, err
    words = ("evaluate", run, "--limit", 40, "--samples", 4, "--estimators", "bound,iwae")
    references = ("--floor", tmp_path / "floor", "--ceiling", tmp_path / "ceiling")
    found = json.loads(ltm(*words, *references, "--json")[1])
    assert set(found["estimates"]) == {"bound", "iwae", "shuffled", "prior"}
    context = found["context"]
    assert context["floor"]["nats_per_token"] - context["ceiling"]["nats_per_token"] == pytest.approx(
        context["difference"]["nats_per_token"]
    )
    text = ltm(*words, *references)[1]
    assert "below" in text
    assert "A prediction sees 7 tokens" in text
    assert bool(context["recovered"]) != ("No R" in text)
    assert "give both" in refused(*words, *references[:2])
    assert "has thoughts" in refused(*words, "--floor", run, "--ceiling", tmp_path / "ceiling")


@pytest.mark.slow
def test_compare_trains_its_references_at_a_budget_of_flops(small_batches, ltm, refused, tmp_path):
    words = ("compare", "--config", small_batches, "--context", "--samples", 2, "--limit", 8, "--out", tmp_path / "out")
    code, out, err = ltm(*words, "--budget", "6e8flops", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = found["rows"]
    assert [row["name"] for row in rows] == ["autoregressive", "floor", "ceiling", "GaussianPrior-MeanField"]
    assert all(5.88e8 < row["flops"] < 6.12e8 for row in rows)
    assert (found["budget"], "minutes" in found) == ("6e8flops", False)
    assert all(row["context_recovered"] is None for row in rows[:3])
    text = " ".join(ltm(*words, "--budget", "6e8flops")[1].split())
    assert "after 6e8flops each" in text
    assert "FLOPs each" in text
    assert "choose another --out" in refused(*words, "--budget", "7e8flops")
    assert "give one" in refused(*words, "--budget", "6e8flops", "--minutes", 1)
    assert "less than 50 of the dearest steps" in refused(*words[:-1], tmp_path / "other", "--budget", "1e7flops")


def test_one_command_trains_the_three_and_goes_on_where_it_stopped(recipe, ltm, refused, tmp_path):
    kinds = ["tea", "coffee"]
    texts = [{"id": n, "kind": kinds[n % 2], "text": f"{kinds[n % 2]} is what number {n} drinks."} for n in range(120)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in texts))
    pack = ("data", "pack", tmp_path / "texts.jsonl", "--out", tmp_path / "data", "--label", "kind", "--id", "id")
    sizes = ("--tokenizer", "bpe:280", "--seq-len", 16, "--val-fraction", 0.4, "--test-fraction", 0.1)
    assert ltm(*pack, *sizes, "--keep-together", "exact")[0] == 0
    words = ("context", "--config", recipe, "--out", tmp_path / "context", "--samples", 3, "--block", 4)
    options = ("--option", f"data.directory={tmp_path / 'data'}", "--option", "trainer.max_steps=1")
    assert "There is no label 'sort'" in refused(*words, *options, "--label", "sort")
    assert "seed_everything would change nothing" in refused(*words, *options, "--option", "seed_everything=3")
    assert "so that nothing tells them apart" in refused(*words, *options, "--label", "kind", "--limit", 1)
    assert "the home of a user who is not here" in refused(*words[:4], "~nobody-of-this-name/x", *options)
    assert "has '::'" in refused(*words[:4], tmp_path / "a::b", *options)
    assert not (tmp_path / "context").exists()
    code, out, err = ltm(*words, *options, "--seeds", 2, "--label", "kind", "--json")
    assert code == 0, err
    assert "6 of 6" in err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "context" / "context.json").read_text())
    assert found["label"]["classes"] == sorted(kinds)
    assert -1 <= found["label"]["adjusted_rand"] <= 1
    assert (tmp_path / "context" / "context.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("floor", "ceiling", "thoughts"):
        scored = [json.loads((tmp_path / "context" / f"{kind}-{n}" / "context.json").read_text()) for n in (0, 1)]
        nats, tokens = (sum(sum(x[name]) for x in scored) for name in ("block_nats", "block_tokens"))
        records = [x for run in scored for x in run["records"]]
        assert tokens == sum(x["tokens"] for x in records)
        assert nats == pytest.approx(sum(x["causal_prior_nats"] for x in records))
        if kind != "thoughts":  # without a latent variable prediction block by block adds up to the bound
            assert nats == pytest.approx(sum(x["bound_nats"] for x in records))
        assert len(found["by_position"][kind]) == len(scored[0]["block_nats"])
    before = (tmp_path / "context" / "thoughts-1" / "context.json").stat().st_mtime_ns
    (tmp_path / "context" / "ceiling-1" / "context.json").unlink()
    shutil.rmtree(tmp_path / "context" / "floor-0")
    assert found["label"]["continuations"].keys() == {*kinds}
    code, text, err = ltm(*words, *options, "--seeds", 2, "--label", "kind", "--workers", 2)
    assert code == 0, err
    assert "6 of 6: " in err
    assert "training" in (tmp_path / "context" / "floor-0.log").read_text()
    assert text.count(found["label"]["prompt"].split()[0]) >= 2
    assert "below" in text
    assert "adjusted Rand index" in text
    assert (tmp_path / "context" / "thoughts-1" / "context.json").stat().st_mtime_ns == before
    assert "another recipe, data or settings" in refused(*words[:-1], 8, *options)


@pytest.mark.slow
def test_ctrl_c_saves_the_runs_beside_each_other(recipe, tmp_path):
    out = tmp_path / "context"
    words = ("--config", recipe, "--out", out, "--workers", 2, "--option", "trainer.max_steps=1000000")
    command = [sys.executable, "-m", "ltm_pyro.cli", "context", *map(str, words)]
    started = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )
    runs = [out / "thoughts-0", out / "ceiling-0"]
    until = time.monotonic() + 120
    while time.monotonic() < until and not all((run / "metrics.csv").exists() for run in runs):
        time.sleep(0.5)
    time.sleep(5)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "the same command resumes" in err
    for run in runs:
        assert (run / "checkpoints" / "last.ckpt").exists()
