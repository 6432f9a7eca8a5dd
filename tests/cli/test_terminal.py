"""What is printed commands no terminal; a closed pipe, a full device and Ctrl-C end a command without a traceback."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ltm_pyro.cli import main
from ltm_pyro.studies.search.report import _write_csv
from ltm_pyro.utils.console import Console, PrintableStream, printable

LTM = (sys.executable, "-P", "-m", "ltm_pyro.cli")
HOSTILE = "before \x1b]0;owned\x07 \x1b[31mred\x9b2J\x7f\x00\rafter\ttab\n"


class Terminal(io.TextIOWrapper):
    """A stream in memory that says it is a terminal."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8")

    def isatty(self):
        return True

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture
def terminal(monkeypatch):
    """Runs ``ltm`` on a terminal; returns the exit code and what is on it."""

    def call(*arguments):
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, out.text(), err.text()

    return call


def commands(text):
    """The control characters of a text that are no line ends, tabs or colours of our own."""
    return {x for x in text if (ord(x) < 32 and x not in "\n\t\r") or 0x7F <= ord(x) < 0xA0}


def test_control_characters_become_symbols():
    assert printable(HOSTILE) == "before ␛]0;owned␇ ␛[31mred\ufffd2J␡␀\rafter\ttab\n"
    assert printable("naïve café 😀 \u4f60\n") == "naïve café 😀 \u4f60\n"


def test_tables_panels_and_progress_show_symbols_and_keep_their_own_colours():
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=60)
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE, style="red")
    console.print(table, Panel(Text(HOSTILE), title=Text(HOSTILE)), HOSTILE)
    shown = stream.text()
    assert "\x1b[31m" in shown
    assert "␛]0;owned" in shown
    assert "\x1b]" not in shown
    assert not commands(shown) - {"\x1b"}


def test_a_stream_of_text_is_printable_and_rich_writes_beside_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", PrintableStream(stream))
    print(HOSTILE, end="", flush=True)
    Console(force_terminal=True, color_system="standard").print("bold", style="bold")
    assert stream.text() == printable(HOSTILE) + "\x1b[1mbold\x1b[0m\n"


def test_prompts_texts_and_errors_command_no_terminal(run, terminal, tmp_path):
    code, out, _ = terminal("generate", run, "--prompt", "a\x1b[2J", "--max-new-tokens", 2)
    assert (code, commands(out)) == (0, set())
    assert "a␛[2J" in out
    code, out, _ = terminal("generate", run, "--prompt", "a\x1b[2J", "--max-new-tokens", 2, "--stream")
    assert (code, commands(out)) == (0, set())
    code, _, err = terminal("evaluate", "run\x1b]0;x\x07")
    assert code == 2
    assert not commands(err)
    assert "␛]0;x" in err


def test_the_texts_of_a_pack_command_no_terminal(ltm, terminal, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a\x1b[2Jb.txt").write_text(f"some {HOSTILE} text".replace("\0", ""))
    options = ("--tokenizer", "bpe:300", "--val-fraction", 0, "--test-fraction", 0)
    assert ltm("data", "pack", tmp_path / "texts", "--out", tmp_path / "out", *options)[0] == 0
    code, out, _ = terminal("data", "show", tmp_path / "out")
    assert code == 0
    assert "owned" in out
    assert not commands(out) - {"\x1b"}  # colours
    assert "\x1b]" not in out
    assert "\x1b[2J" not in out


def test_a_table_for_a_spreadsheet_has_no_formulas(tmp_path):
    row = {"state": "=cmd|' /C calc'!A0", "number": -3, "parameters": {"x": "+1"}, "figures": {"@SUM(A1)": -1.5}}
    _write_csv([row], tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == (
        "state,number,params_x,'@SUM(A1)\n" + "'=cmd|' /C calc'!A0,-3,'+1,-1.5\n"
    )


PRINTING = {"help": ("--help",), "version": ("--version",), "a command's help": ("data", "show", "--help")}


@pytest.mark.parametrize("kind", [*PRINTING, "show"])
def test_a_full_device_and_a_closed_pipe(kind, packed):
    arguments = PRINTING.get(kind, ("data", "show", packed, "--json"))
    for name, code in (("/dev/full", 2), ("pipe", 1), ("closed", 0)):
        with open("/dev/full", "wb") as full:
            if name == "closed":
                command = ("sh", "-c", 'exec "$@" >&-', "sh", *LTM, *arguments)
                ended = subprocess.run([*map(str, command)], stderr=subprocess.PIPE, timeout=120, check=False)
            elif name == "pipe":
                reading, writing = os.pipe()
                os.close(reading)
                ended = subprocess.run(
                    [*map(str, (*LTM, *arguments))], stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
                )
                os.close(writing)
            else:
                ended = subprocess.run(
                    [*map(str, (*LTM, *arguments))], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False
                )
        err = ended.stderr.decode()
        assert ended.returncode == code, (name, err)
        assert "Traceback" not in err
        assert "Exception ignored" not in err
        assert ("disk is full" in err) == (name == "/dev/full")
        assert err.count("\n") <= 1


def test_an_error_that_cannot_be_printed_keeps_its_exit_code():
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*LTM, "evaluate", "nowhere"], stdout=full, stderr=full, timeout=120, check=False)
    assert ended.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data verify", "fit", "evaluate", "study list"])
def test_an_interruption_while_starting_is_one_line(name, tmp_path):
    """At any moment from the first line of ours on, which prints an x here; before that it is Python that starts."""
    hook = "import sys; from importlib import import_module; ours = import_module('ltm_pyro.cli.main'); "
    hook += "split = ours._split; ours._split = lambda words: print('x', flush=True) or split(words); "
    hook += "sys.argv[0] = 'ltm'; ours.main(sys.argv[1:])"
    for delay in (0, 0.05, 0.2, 0.5, 1, 1.5, 2, 3):
        command = [sys.executable, "-P", "-c", hook, *name.split(), "nowhere", "--help"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        assert child.returncode in (0, 2, 130, -signal.SIGINT), (delay, err)  # the last where Python has ended
        assert (child.returncode == 130) == (b"interrupted." in err), (delay, err)
        assert b"Traceback" not in err, (delay, err)
        assert b"Exception ignored" not in err, (delay, err)


def test_an_interruption_that_a_library_swallows_is_one(monkeypatch, ltm):
    """An import that Ctrl-C has cut may go on without a module, and fail over that later."""

    def fit(_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RecursionError("a module is missing")

    monkeypatch.setattr("ltm_pyro.cli.fit.run", fit)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        code, out, err = ltm("fit")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err) == (130, "", "\nltm fit: interrupted.\n")
