"""Workers on a real PostgreSQL server, of which one is killed, one interrupted, one late; the server and the disk go
away for a while: every trial complete once, none lost, none running, none failed by its surroundings.
"""

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

TOTAL, AWAY, FULL = 40, 180, 60  # trials; seconds without the server, and of a full disk
SLOW = """
'''Does every trial come to its end?'''
import time
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.1, 1.0)}
def objective(setting):
    time.sleep(2)
    if (setting.run.parents[1] / "full").exists():
        raise OSError(28, "No space left on device")
    while (setting.run.parents[1] / "hold").exists():
        time.sleep(0.2)
    return {"bound": setting.parameters.get("model.inference.rate", 1.0)}
"""
IMPATIENT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    "from ltm_pyro.studies.search import trials; trials.HEARTBEAT, trials.GRACE = 1, 15\n"
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
    start = ("-w", "-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
    call("pg_ctl", *start)

    def away(seconds):
        call("pg_ctl", "-m", "fast", "stop")
        time.sleep(seconds)
        call("pg_ctl", *start)

    yield f"postgresql+psycopg://ltm@127.0.0.1:{port}/postgres", away
    call("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def state_counts(url):
    with open_existing(url) as storage:
        study = trials.load_study(storage, "slow")
        return [t.state.name for t in study.get_trials(deepcopy=False)]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_happens_to_workers_server_and_disk_costs_no_trial(server, recipe, study_file, tmp_path):
    (url, away), source = server, study_file(SLOW, "slow")

    def worker(number):
        options = ("--base-config", recipe, "--budget", "2e9flops", "--trials", TOTAL, "--repeats", 0)
        place = ("--storage", url, "--out", tmp_path / f"worker{number}", "--json")
        command = [sys.executable, "-P", "-c", IMPATIENT, "study", "run", source, *options, *place]
        with (tmp_path / f"worker{number}.log").open("w") as log:
            return subprocess.Popen([str(x) for x in command], stdout=log, stderr=log)

    def has_begun(number):
        return bool(list((tmp_path / f"worker{number}").glob("trial-*")))

    workers = {0: worker(0)}
    wait_for(lambda: has_begun(0))
    workers |= {number: worker(number) for number in (1, 2)}
    wait_for(lambda: has_begun(1) and has_begun(2) and state_counts(url).count("COMPLETE") >= 4)
    hold = tmp_path / "hold"  # else the others may be done before a new worker has started on a busy machine
    hold.touch()
    workers[1].send_signal(signal.SIGKILL)
    assert workers.pop(1).wait() == -signal.SIGKILL
    workers[2].send_signal(signal.SIGINT)
    assert workers.pop(2).wait() == 130
    workers |= {number: worker(number) for number in (3, 4)}  # one of them late
    wait_for(lambda: has_begun(3) and has_begun(4))
    hold.unlink()
    before = state_counts(url).count("COMPLETE")
    away(AWAY)
    wait_for(lambda: state_counts(url).count("COMPLETE") > before)
    full = tmp_path / "full"
    full.touch()
    time.sleep(FULL)
    full.unlink()
    codes = {number: process.wait(600) for number, process in workers.items()}
    logs = {number: (tmp_path / f"worker{number}.log").read_text() for number in range(5)}
    assert codes == {0: 0, 3: 0, 4: 0}, logs
    assert any("does not answer" in log and "is back after" in log for log in logs.values())
    assert any("the disk is full: trial" in log for log in logs.values())

    found = search.describe(url, "slow")
    searched = [row for row in found["trials"] if row["role"] == "trial"]
    assert [row["state"] for row in searched] == ["complete"] * TOTAL
    assert len({row["parameters"]["model.inference.rate"] for row in searched}) == TOTAL
    assert state_counts(url).count("RUNNING") == 0
    with open_existing(url) as storage:
        every = trials.load_study(storage, "slow").get_trials(deepcopy=False)
    lost = [t.user_attrs[trials.REASON] for t in every if t.state.name == "FAIL"]
    assert all("it waits again" in reason for reason in lost)
    assert {reason.split(";")[0] for reason in lost} == {"its worker died", "interrupted", "the disk is full"}
    assert [row["state"] for row in found["trials"] if row["role"] == "baseline"] == ["complete"]
