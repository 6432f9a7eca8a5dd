"""Runs commands on hostile artefacts in this process, under an audit hook that notes what they should not do.

    python -P tests/cli/audited.py CASES.json RESULTS.json

A case is {"name", "cwd", "home", "argv" or "load"}: below ``home`` files may be opened, ``load`` is a run. A result has
exit code, stdout, stderr, and what the hook has noted: code executed from a file below ``home`` or with `MARK` in it,
programs started, connections, files opened outside ``home``, the installation and the temporary folder.
"""

import io
import json
import os
import platform
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

MARK = "HOSTILE_PAYLOAD"
ROOT = Path(__file__).resolve().parents[2]
INSTALLED = (sys.prefix, sys.base_prefix, sys.exec_prefix, ROOT, "/usr", "/lib", "/etc", "/proc", "/sys", "/dev")
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.spawn",
    "pty.spawn",
)
CALLS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.bind",
    "urllib.Request",
)
SECRETS = ("/etc/passwd", "/etc/shadow", "/etc/hostname")  # libraries may read other parts of /etc
noted: list[str] = []
home: Path | None = None  # of the case that runs


def below(path: str, *folders: object) -> bool:
    return any(path == str(folder) or path.startswith(f"{folder}{os.sep}") for folder in folders)


def hook(event: str, args: tuple[object, ...]) -> None:
    if home is None:
        return
    if event in STARTS or event in CALLS:
        noted.append(f"{event} {args!r}"[:300])
    elif event == "exec":
        code = args[0]
        elsewhere = not code.co_filename.startswith("<")  # <string>, as dataclasses and named tuples are made
        if (elsewhere and below(os.path.abspath(code.co_filename), home)) or MARK in repr(code.co_consts):
            noted.append(f"executes {code.co_filename}")
    elif event == "compile" and MARK in str(args[0]):
        noted.append(f"compiles {args[1]}")
    elif event == "pickle.find_class" and args[0] in ("os", "posix", "subprocess", "builtins"):
        noted.append(f"unpickles {args!r}")
    elif event == "open" and isinstance(args[0], str | bytes):
        path = os.path.realpath(os.fsdecode(args[0]))
        own = (os.path.expanduser("~/.cache"), os.environ["XDG_DATA_HOME"])
        if path in SECRETS or not below(path, home, tempfile.gettempdir(), *own, *INSTALLED):
            noted.append(f"opens {path}")


def run(case: dict) -> dict:
    global home
    from ltm_pyro.cli import main
    from ltm_pyro.errors import UsageError
    from ltm_pyro.runs.load import load_run

    os.chdir(case["cwd"])
    noted.clear()
    # a stream with a buffer, as the terminal's
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2))
    home = Path(case["home"]).resolve()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            if "load" in case:
                load_run(case["load"])
                code = 0
            else:
                main(case["argv"])
    except SystemExit as end:
        code = end.code
    except UsageError as error:
        code = 2
        err.write(str(error))
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    home = None
    said = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))
    return {"name": case["name"], "code": code, "noted": [*noted], **dict(zip(("out", "err"), said, strict=True))}


if __name__ == "__main__":
    cases, results = sys.argv[1:]
    sys.addaudithook(hook)
    platform.processor()  # asks a program, once
    import matplotlib.font_manager  # noqa: F401 - asks a program for the fonts, once
    import optuna  # noqa: F401
    import pytorch_lightning  # noqa: F401 - before xarray, or jsonargparse reads whole numbers as fractions
    import xarray  # noqa: F401
    import zarr  # noqa: F401

    done = [run(case) for case in json.loads(Path(cases).read_text())]
    Path(results).write_text(json.dumps(done))
