"""Own priors and guides from training to the report: saved, loaded in another process from another folder, and read."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import own_parts

FILE = Path(own_parts.__file__)
QUICK = ("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1)
PAIRS = [(prior, "") for prior in own_parts.PRIORS] + [("Horseshoe", guide) for guide in own_parts.GUIDES]
SCRIPT = """
import json, sys
from pathlib import Path
from ltm_pyro import load_run
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.analysis.report import write_report

found = {}
for name in json.loads(sys.argv[2]):
    run = load_run(Path(sys.argv[1]) / name)
    twice = [evaluate_run(run, estimators=["bound"], samples=2, limit=3) for _ in "ab"]
    figures = [x.estimates["bound"].nats_per_token for x in twice]
    written = generate(run, ["the old"], Sampling(max_new_tokens=2))
    posterior = draw_posterior(run, ["the old model reads"], DrawOptions(samples=25))
    posterior.save(f"{name}.nc")
    found[name] = figures + [len(written), Path(f"{name}.nc").stat().st_size]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_own_prior_and_guide_goes_the_whole_way(recipe, ltm, tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    file = shutil.copy(FILE, home / "mine.py")
    here, names = {}, []
    for prior, guide in PAIRS:
        name = f"{prior}{guide}"
        parts = ("--model.prior", f"{file}:{prior}", *(("--model.guide", f"{file}:{guide}") if guide else ()))
        code, _, err = ltm("fit", "--config", recipe, "--run", home / name, *QUICK, *parts)
        assert code == 0, err
        code, out, err = ltm("evaluate", home / name, "--estimators", "bound", "--samples", 2, "--limit", 3, "--json")
        assert code == 0, err
        here[name] = json.loads(out)["estimates"]["bound"]["nats_per_token"]
        names.append(name)
    command = [sys.executable, "-c", SCRIPT, str(home), json.dumps(names)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        assert there[name][0] == there[name][1] == pytest.approx(here[name], abs=1e-5), name
        assert there[name][2] == 1
        report = ("report", elsewhere / f"{name}.nc", "--run", home / name, "--out", elsewhere / f"{name}.html")
        assert ltm(*report)[0] == 0, name


@pytest.mark.parametrize("prior", [*own_parts.REFUSED])
def test_what_is_refused_is_refused_before_anything_is_written(prior, recipe, refused, tmp_path):
    message = refused("fit", "--config", recipe, "--run", tmp_path / "run", *QUICK, "--model.prior", f"{FILE}:{prior}")
    assert own_parts.REFUSED[prior] in message
    assert not (tmp_path / "run").exists()
