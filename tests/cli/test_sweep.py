"""Every option of every command with every kind of bad value: one sentence or a result, and nothing of anybody lost.

The cases come from the parsers, so that a new option is tried as soon as it is there.
"""

import argparse
import hashlib
import os
import shutil
import signal
import threading
from importlib import import_module
from pathlib import Path

import pytest

from ltm_pyro.cli.arguments import Parser
from ltm_pyro.cli.main import COMMANDS
from tests.cli.conftest import call
from tests.usage import recipe_keys

LONG = "x" * 300
BAD = {  # kind -> the words given to an option
    "a word": ["soon"],
    "empty": [""],
    "a blank": [" "],
    "negative": ["-1"],
    "zero": ["0"],
    "half": ["0.5"],
    "huge": ["100000000000000000000"],
    "23 digits": ["9" * 23],
    "5,000 digits": ["9" * 5000],
    "NaN": ["nan"],
    "infinite": ["inf"],
    "minus infinite": ["-inf"],
    "other digits": ["٣"],
    "a list": ["[1,2]"],
    "a mapping": ["{a: 1}"],
    "commas": [",,"],
    "null": ["null"],
    "missing": ["nowhere/at/all"],
    "a folder": ["folder"],
    "a file": ["notes.txt"],
    "an empty file": ["empty.txt"],
    "an archive": ["archive.tar"],
    "300 characters": [LONG],
    "300 characters and a folder": [f"{LONG}/x"],
    "a home that is not there": ["~nobody-of-this-name/x"],
    "two addresses": ["a::b"],
    "above": ["../ESC"],
    "a device": ["/dev/full"],
    "control characters": ["a\x1b[2J\nb"],
    "not UTF-8": ["\udcff"],
    "nothing": [],
}
SECONDS = 60  # of one case
COSTLY = {"baselines", "bench", "check-inference", "compare", "study run"}  # whose defaults work for minutes
TRAINER = ("max_steps", "max_epochs", "devices", "accelerator", "precision", "limit_val_batches", "val_check_interval")


def options(command: str) -> list[argparse.Action]:
    """The actions of a command's parser, but for its help."""
    parser = Parser(prog=f"ltm {command}")
    import_module(COMMANDS[command][0]).add_arguments(parser)
    return [action for action in parser._actions if action.dest != "help"]


def cases() -> list[tuple[str, str, str]]:
    """Command, option (or the name of an argument) and kind of the bad value."""
    found = []
    for command in COMMANDS:
        if command == "fit":
            keys = [key for key in recipe_keys() if key.split(".")[0] in ("model", "data", "run", "ckpt_path")]
            keys = [key for key in keys if "." not in key or key.startswith(("model.", "data."))]
            keys += [f"trainer.{name}" for name in TRAINER] + ["seed_everything", "warm_start", "config"]
            names = [f"--{key.replace('model.decoder.', 'model.decoder.init_args.')}" for key in keys]
        else:
            names = [(action.option_strings or [action.dest])[-1] for action in options(command)]
            switches = {a.option_strings[-1] for a in options(command) if a.option_strings and a.nargs == 0}
            names = [name for name in names if name not in switches]
        found += [(command, name, kind) for name in names for kind in BAD]
    return found


CASES = cases()


def test_there_are_enough_cases():
    assert len(CASES) >= 1500
    assert {command for command, _, _ in CASES} == set(COMMANDS) - {"study list"} | {"study list"}


class Hang(BaseException):
    """A case takes too long."""


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its digest."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture
def scene(run, packed, corpus, recipe, ltm, tmp_path_factory, monkeypatch):
    """A folder to work in, and the words with which each command succeeds in a second or two."""
    there = tmp_path_factory.mktemp("scene")
    monkeypatch.chdir(there)
    monkeypatch.setenv("HOME", str(there / "home"))
    (there / "home").mkdir()
    (there / "mine").mkdir()
    shutil.copytree(run, there / "mine" / "run")
    shutil.copytree(packed, there / "mine" / "pack")
    (there / "mine" / "text.txt").write_text("the old day\n\n\na small model\n")
    (there / "mine" / "recipe.yaml").write_text(recipe.read_text().replace(str(packed), "mine/pack"))
    (there / "notes.txt").write_text("some words of mine")
    (there / "empty.txt").touch()
    (there / "archive.tar").write_bytes((packed / "val-000000.tar").read_bytes())
    (there / "folder").mkdir()
    out = ("--out", "new/out.nc")
    posterior = ("posterior", "mine/run", "--input", "mine/text.txt", "--samples", 25, "--fast-steps", 1)
    for name in ("a", "b"):
        assert ltm(*posterior, "--out", f"mine/{name}.nc", "--seed", len(name))[0] == 0
    return there, {
        "data pack": ("mine/text.txt", "--out", "new/pack", "--tokenizer", "bpe:280"),
        "data make": ("permutation", "--out", "new/task", "--sequences", 50),
        "data verify": ("mine/pack",),
        "data show": ("mine/pack",),
        "fit": ("--config", "mine/recipe.yaml", "--run", "new/run", "--trainer.max_steps", 1),
        "evaluate": ("mine/run", "--data", "mine/text.txt", "--samples", 2, "--fast-steps", 1),
        "generate": ("mine/run", "--max-new-tokens", 2, "--fast-steps", 1),
        "posterior": (*posterior[1:], *out),
        "calibrate": ("mine/run", "--simulations", 20, "--samples", 9, "--fast-steps", 1, "--out", "new/c.nc"),
        "report": ("mine/a.nc", "--out", "new/report.html"),
        "show": ("mine/run",),
        "check-prior": ("mine/recipe.yaml", "--samples", 2, "--texts", 0, "--picture", "new/picture.png"),
        "evidence": ("mine/a.nc", "mine/b.nc", "--picture", "new/picture.png"),
        "new": ("prior", "new_prior"),
        "export": ("mine/run", "--out", "new/export"),
        "flops": ("--config", "mine/recipe.yaml"),
        "study list": (),
        "study show": (),
        "study report": (),
        "study best": (),
    }


def with_bad_value(command: str, name: str, words: list[str], given: tuple) -> list[str]:
    """The words of a command that works, and one of its options or arguments with a bad value."""
    given = [str(word) for word in given]
    if name.startswith("-"):
        at = given.index(name) if name in given else None
        if at is not None:
            del given[at : at + 2]
        return [*command.split(), *given, *([f"{name}={words[0]}"] if words else [name])]
    index = [action.dest for action in options(command) if not action.option_strings].index(name)
    return [*command.split(), *given[:index], *words, *given[index + 1 :]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_bad_value_ends_in_a_traceback_or_loses_anything(command, scene):
    there, valid = scene
    mine = contents(there / "mine") | contents(there / "folder")
    outside = set(os.listdir(there.parent)) | set(os.listdir("/dev"))
    wrong = []

    def hang(*_):
        raise Hang

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, hang)
    try:
        for _, name, kind in (case for case in CASES if case[0] == command):
            given = valid.get(command)
            if command in COSTLY or given is None:  # refused before the work begins, or not at all
                given = ("mine/nothing",) if command == "compare" else ()
            words = with_bad_value(command, name, BAD[kind], given)
            if command in COSTLY:
                words.append("--no-such-option")
            signal.alarm(SECONDS)
            try:
                code, _, err = call(*words)
                problem = None if code in (0, 1, 2) and "Traceback" not in err else f"exit code {code}: {err[-300:]}"
            except Hang:
                problem = "hangs"
            except BaseException as error:  # what would be a traceback
                problem = f"{type(error).__name__}: {str(error)[:300]}"
            finally:
                signal.alarm(0)
            now = contents(there / "mine") | contents(there / "folder")
            if lost := {path for path in mine if now.get(path) != mine[path]} - {f"{there}/mine/run/test-uses.jsonl"}:
                problem = f"lost or changed {sorted(lost)[:3]}"
                mine = now
            if (here := set(os.listdir(there.parent)) | set(os.listdir("/dev"))) != outside:
                made = sorted(here - outside)
                if made != ["ESC"] or name == "--study-name":  # a path may be above, a name may not
                    problem = f"left {made} outside"
                for leftover in (there.parent / each for each in made):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if problem:
                wrong.append(f"{command} {name}, {kind}: {problem}")
            for leftover in there.iterdir():
                if leftover.name not in ("mine", "home", "folder", "notes.txt", "empty.txt", "archive.tar"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not wrong, "\n".join(wrong)
