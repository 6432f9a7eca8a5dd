"""Three workers on a real PostgreSQL server, one of them killed: every trial complete once, none lost, none running."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ltm_pyro.studies.search import study as search
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.storage import open_existing

TOTAL = 24
SLOW = """
'''Does every trial come to its end?'''
import time
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.1, 1.0)}
def objective(setting):
    time.sleep(1.5)
    while (setting.run.parents[1] / "hold").exists():
        time.sleep(0.2)
    return {"bound": setting.parameters.get("model.inference.rate", 1.0)}
"""
IMPATIENT = (
    "from ltm_pyro.studies.search import storage; storage.HEARTBEAT, storage.GRACE = 1, 15\n"
    "from ltm_pyro.cli import main; main()"
)


def binaries():
    """Where the server's programs are; installs them from the system's packages when they are missing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "--yes", "--quiet", "postgresql"], check=True)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL server here, and no way to install one")
    return found[-1]


@pytest.fixture
def server():
    """The URL of a server of our own on loopback; it refuses to run as root."""
    programs = binaries()
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    become = ["runuser", "-u", user, "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="ltm-pg-"))
    shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        log = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*become, programs / program, "-D", folder / "data", *arguments], check=True, cwd="/", **log)

    call("initdb", "--auth=trust", "--username=ltm", "--no-sync")
    call("pg_ctl", "-w", "-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
    yield f"postgresql+psycopg://ltm@127.0.0.1:{port}/postgres"
    call("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def state_counts(url):
    with open_existing(url) as storage:
        study = trials.load_study(storage, "slow")
        return [t.state.name for t in study.get_trials(deepcopy=False)]


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(server, recipe, study_file, tmp_path):
    source = study_file(SLOW, "slow")

    def worker(number):
        options = ("--base-config", recipe, "--budget", "1e9flops", "--trials", TOTAL, "--repeats", 0)
        place = ("--storage", server, "--out", tmp_path / f"worker{number}", "--json")
        command = [sys.executable, "-P", "-c", IMPATIENT, "study", "run", source, *options, *place]
        with (tmp_path / f"worker{number}.log").open("w") as log:
            return subprocess.Popen([str(x) for x in command], stdout=log, stderr=log)

    workers = [worker(0)]
    wait_for(lambda: "0 of" not in (tmp_path / "worker0.log").read_text() and (tmp_path / "worker0").exists())
    workers += [worker(1), worker(2)]
    wait_for(lambda: list((tmp_path / "worker1").glob("trial-*")) and state_counts(server).count("COMPLETE") >= 4)
    hold = tmp_path / "hold"  # else the others may be done before a new worker has started on a busy machine
    hold.touch()
    workers[1].send_signal(signal.SIGKILL)
    assert workers[1].wait() == -signal.SIGKILL
    workers[1] = worker(3)
    wait_for(lambda: list((tmp_path / "worker3").glob("trial-*")))
    hold.unlink()
    codes = [process.wait(300) for process in workers]
    assert codes == [0, 0, 0], [(tmp_path / f"worker{n}.log").read_text() for n in range(4)]

    states = state_counts(server)
    assert states.count("COMPLETE") == TOTAL
    assert states.count("RUNNING") == 0
    found = search.describe(server, "slow")
    searched = [row for row in found["trials"] if row["role"] == "trial" and row["state"] == "complete"]
    assert len(searched) == TOTAL
    assert len({row["parameters"]["model.inference.rate"] for row in searched}) == TOTAL
    assert [row["state"] for row in found["trials"] if row["role"] == "baseline"] == ["complete"]
    assert all(len(list((tmp_path / f"worker{n}").glob("trial-*"))) > 0 for n in (0, 2, 3))
