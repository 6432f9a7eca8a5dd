"""Help of all commands, without waiting for torch."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import ltm_pyro
from ltm_pyro.cli.main import COMMANDS

HEAVY = {"torch", "pyro", "pytorch_lightning"}


def loaded_by(*arguments):
    """The heavy packages that ``ltm`` with ``arguments`` imports."""
    code = (
        f"import sys; from ltm_pyro.cli import main\ntry: main({[*arguments]})\nexcept SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_ltm_lists_its_commands(ltm, arguments):
    code, out, err = ltm(*arguments)
    assert (code, err) == (0, "")
    assert all(name in out and line in out for name, (_, line) in COMMANDS.items())


@pytest.mark.parametrize("arguments", [("data",), ("data", "--help")])
def test_a_group_lists_its_own_commands(ltm, arguments):
    code, out, _ = ltm(*arguments)
    assert code == 0
    assert "data pack" in out
    assert "evaluate" not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(ltm, name):
    code, out, err = ltm(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ltm {name}")


@pytest.mark.parametrize(
    ("name", "option", "default"),
    [("evaluate", "--samples S,…", "16"), ("data pack", "--seq-len N", "128"), ("posterior", "--seed N", "0")],
)
def test_help_says_defaults_once_and_only_where_there_are_any(ltm, name, option, default):
    help_of = dict(
        re.findall(r"^  (--.*?)(?:  +|\n +)(.*(?:\n {20,}.*)*)", ltm(*name.split(), "--help")[1], re.MULTILINE)
    )
    assert help_of[option].endswith(f"(default: {default})")
    assert "default" not in help_of["--json"]
    assert all(text.count("default") <= 1 and "None" not in text for text in help_of.values())


def test_versions_are_those_installed(ltm):
    found = version("ltm-pyro")
    assert ltm("--version") == (0, f"ltm_pyro {found}, torch {version('torch')}, pyro {version('pyro-ppl')}\n", "")
    assert ltm_pyro.__version__ == found


def test_help_need_not_wait_for_torch():
    assert not loaded_by("--help") | loaded_by("--version")
    assert "pytorch_lightning" not in loaded_by("evaluate", "--help")
    assert "pytorch_lightning" not in loaded_by("generate", "--help")


def test_the_package_is_light_until_it_is_used():
    code = "import sys, ltm_pyro; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_public_name_is_there():
    assert sorted(ltm_pyro.__all__) == sorted(set(ltm_pyro.__all__))
    assert all(getattr(ltm_pyro, name).__doc__ for name in ltm_pyro.__all__)
    assert set(ltm_pyro.__all__) <= set(dir(ltm_pyro))
    with pytest.raises(AttributeError, match="nothing"):
        _ = ltm_pyro.nothing
