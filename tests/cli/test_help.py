"""Help that is there at once, and says what there is."""

import subprocess
import sys

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


def test_help_need_not_wait_for_torch():
    assert not loaded_by("--help")
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
