"""A run trained for three steps on generated English, and the command line called in this process."""

import json
import random
import sys
from io import BytesIO, TextIOWrapper

import pytest
import torch
import yaml

from ltm_pyro.cli import main
from tests.cli.hostile import MISSING, PRIOR

WORDS = [
    "the",
    "a",
    "small",
    "model",
    "of",
    "every",
    "language",
    "reads",
    "long",
    "text",
    "and",
    "writes",
    "short",
    "words",
    "about",
    "time",
    "people",
    "day",
    "old",
]
RECIPE = {
    "model": {
        "decoder": {
            "class_path": "ltm_pyro.models.Decoder",
            "init_args": {"layers": 2, "width": 16, "heads": 2, "thoughts": 2, "window": 4, "length": 16},
        },
        "inference": {"steps": 2},
        "evaluation": {"steps": 2, "rate": 0.1},
    },
    "trainer": {"max_steps": 3, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1},
}


def call(*arguments):
    """Exit code, standard output and standard error of ``ltm`` with ``arguments``."""
    streams = sys.stdout, sys.stderr
    out, err = (TextIOWrapper(BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    sys.stdout, sys.stderr = out, err
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code, *(_written(stream) for stream in (out, err))
    finally:
        sys.stdout, sys.stderr = streams
    raise AssertionError("ltm did not exit")


def _written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode()


@pytest.fixture(autouse=True)
def float32(same_ground):
    """Checkpoints are float32, and so is the command line."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def ltm():
    """Calls ``ltm``; returns exit code, standard output and standard error."""
    return call


@pytest.fixture
def refused():
    """Calls ``ltm``, which must refuse in one sentence with exit code 2; returns the sentence."""

    def refuse(*arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("ltm")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return refuse


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A hundred documents of common words."""
    path = tmp_path_factory.mktemp("english") / "corpus.jsonl"
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS, k=50)) + "." for _ in range(100))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def packed(corpus, tmp_path_factory):
    """The corpus in sequences of 16; not to be changed."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    options = ("--tokenizer", "bpe:280", "--seq-len", 16, "--val-fraction", 0.2)
    assert call("data", "pack", corpus, "--out", out, *options)[0] == 0
    return out


@pytest.fixture(scope="session")
def recipe(packed, tmp_path_factory):
    """A recipe of three steps for a decoder of 15,000 parameters."""
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": {"directory": str(packed), "batch_size": 8}}), "utf-8")
    return path


@pytest.fixture(scope="session")
def small_batches(packed, tmp_path_factory):
    """The recipe with steps of two sequences and without validation: 50 steps cost less than 6e8 FLOPs."""
    path = tmp_path_factory.mktemp("small") / "recipe.yaml"
    trainer = RECIPE["trainer"] | {"limit_val_batches": 0}
    settings = RECIPE | {"data": {"directory": str(packed), "batch_size": 2}, "trainer": trainer}
    path.write_text(yaml.safe_dump(settings), "utf-8")
    return path


@pytest.fixture(scope="session")
def run(recipe, tmp_path_factory):
    """A run directory; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = call("fit", "--config", recipe, "--run", path)
    assert code == 0, err
    return path


@pytest.fixture
def exported(run, ltm, tmp_path):
    """An export, as somebody else would make it, with hostile modules beside it."""
    folder = tmp_path / "theirs"
    code, _, err = ltm("export", run, "--out", folder / "export")
    assert code == 0, err
    for name in MISSING:
        (folder / f"{name}.py").write_text(PRIOR)
        (folder / "export" / f"{name}.py").write_text(PRIOR)
    (folder / "inner.yaml").write_text("class_path: evil.py:Prior\nsteps: 1\n")
    (folder / "export" / "inner.yaml").write_text("class_path: evil.py:Prior\nsteps: 1\n")
    (folder / "text.txt").write_text("every small model reads of people")
    return folder / "export"
