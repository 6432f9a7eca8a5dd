"""What is no density is refused in one sentence by every command, also where a file changed after training."""

import re
import sys
from pathlib import Path

import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.runs.load import load_run
from tests import no_densities
from tests.no_densities import REFUSED, learned_factor

SOURCE = Path(no_densities.__file__).read_text("utf-8")
FAULTS = {
    **{f"super().__init__(shape, {program.__name__})": message for program, message in REFUSED.items()},
    f"super().__init__(shape, {learned_factor.__name__})": "The factor 'f' .* depends on what is learned",
    "class MyGuide(MixtureGuide)": "site 'z' is a MixtureSameFamily without reparameterised samples",
}


@pytest.fixture
def parts(tmp_path):
    """A user's file of a prior and a guide, and the options that name them."""
    file = tmp_path / "mine.py"
    file.write_text(SOURCE, "utf-8")
    yield file, ("--model.prior", f"{file}:Mine", "--model.guide", f"{file}:MyGuide")
    sys.modules.pop("mine", None)


def spoil(file, fault):
    sound = "class MyGuide(MeanField)" if "MyGuide" in fault else "super().__init__(shape, learned_scale)"
    assert SOURCE.count(sound) == 1
    file.write_text(SOURCE.replace(sound, fault), "utf-8")


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_refused_alike_everywhere(fault, parts, recipe, ltm, tmp_path):
    file, options = parts
    run, texts = tmp_path / "run", tmp_path / "texts.txt"
    texts.write_text("a model")
    fit = ("fit", "--config", recipe, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 1, *options)
    code, _, err = ltm(*fit, "--run", run)
    assert code == 0, err
    spoil(file, fault)
    for command in (
        (*fit, "--run", tmp_path / "other"),
        ("evaluate", run, "--samples", 2, "--limit", 2, "--trust"),
        ("show", run, "--trust"),
        ("posterior", run, "--input", texts, "--out", tmp_path / "q.nc", "--samples", 25, "--trust"),
        ("generate", run, "--prompt", "every", "--max-new-tokens", 1, "--trust"),
    ):
        sys.modules.pop("mine")
        code, out, err = ltm(*command)
        sentence = err.splitlines()[-1]  # what --trust lists comes first
        assert (code, out) == (2, ""), command
        assert re.search(FAULTS[fault], sentence), command
        assert "Traceback" not in err
    sys.modules.pop("mine")
    with pytest.raises(UsageError, match=FAULTS[fault]):
        evaluate_run(load_run(run, trust=True), limit=2, samples=2)
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "q.nc").exists()
