"""A farm on one machine: a tracker, three boards, one of which is killed while it measures."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import bnntvm
from benchmarks.layers import Layer
from bnntvm.tuning import board, records, rpc


@pytest.fixture
def farm():
    """(address of the tracker, the boards)."""
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", 9190, 19190, silent=True)
    address = "127.0.0.1", tracker.port
    with ThreadPoolExecutor(3) as pool:
        ports = (9100, 10100, 11100)
        servers = list(pool.map(lambda p: board.serve(address, "test", host="127.0.0.1", port=p, address="127.0.0.1", silent=True), ports))
    deadline = time.monotonic() + 60
    while len(rpc.boards(address, "test")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    yield address, servers
    for server in servers:
        server.terminate()
    tracker.terminate()


def test_a_board_that_vanishes_loses_nothing(farm, tmp_path):
    address, servers = farm
    model = Layer(32, 6).chain(1).SerializeToString()
    assert len(rpc.boards(address, "test")) == 3
    database = tmp_path / records.RECORDS

    def kill():
        while not database.exists() or database.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(servers[0].proc._proc.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = bnntvm.tune(model, trials=10, database=tmp_path, rpc=f"{address[0]}:{address[1]}", key="test", progress=False)
    killer.join(5)
    assert (result.measured, result.failed) == (10, 0)
    assert len(rpc.boards(address, "test")) == 2
    assert len({(r.task, r.schedule) for r in records.read(tmp_path)[0]}) == 10
    assert not any(r.failed for r in records.read(tmp_path)[0])


def test_no_farm(tmp_path):
    with pytest.raises(bnntvm.BnnError, match="tracker does not answer"):
        rpc.boards(("127.0.0.1", 1), "test")
