"""A board that dies while the command line uses it: an error and exit status 1, soon."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import bnntvm
from benchmarks.layers import Layer

from .farm import farm

#: Seconds after the board's end within which a command has to end.
PATIENCE_S = 30


def children(pid):
    """Processes that a process started."""
    found = [path.read_text().split() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for words in found for child in words]


def seconds(pid):
    """Processor time of a process."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    bnntvm.build(Layer(32, 6).chain(1)).export(folder / "network.bnn")
    return folder


@pytest.fixture(scope="module")
def boards():
    with farm([[sys.executable]] * 3) as found:  # every test kills one
        yield found


@pytest.mark.parametrize("words, work_s", [
    (["bench", "--repeat", "100000000"], 1.0), (["profile", "--seconds", "600"], 1.0), (["run", "--random"], 0.0),
])  # fmt: skip
def test_killed(network, boards, words, work_s):
    """The processes of the board that was chosen get SIGKILL, after ``work_s`` seconds of their work; 0: between two messages."""
    address, servers = boards
    command = [sys.executable, "-m", "bnntvm", words[0], str(network / "network.bnn"), *words[1:], "--rpc", address, "--key", "test"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: any(children(server.pid) for server in servers), client)
        ((server, session),) = [(server.pid, child) for server in servers for child in children(server.pid)]
        if not work_s:  # what it was sent is not answered any more
            os.kill(session, signal.SIGSTOP)
            time.sleep(1)
        wait_for(lambda: seconds(session) >= work_s, client)
        for pid in (server, session):
            os.kill(pid, signal.SIGKILL)
        output, errors = client.communicate(timeout=PATIENCE_S)
    finally:
        client.kill()
    assert client.returncode == 1 and errors.startswith("error: ") and "Traceback" not in errors and not output, (output, errors)
