"""A farm on one machine: a tracker, three boards, one of which is killed while it measures."""

import sys
import threading
import time

import pytest

import bnntvm
from benchmarks.layers import Layer
from bnntvm.remote import client
from bnntvm.tuning import records
from tests.bnntvm.remote.farm import farm


def test_a_board_that_vanishes_loses_nothing(tmp_path):
    with farm([[sys.executable]] * 3) as (address, servers):
        vanish(client.parse_address(address), servers, tmp_path)


def vanish(address, servers, tmp_path):
    model = Layer(32, 6).chain(1).SerializeToString()
    assert len(client.boards(address, "test")) == 3
    database = tmp_path / records.RECORDS

    def kill():
        while not database.exists() or database.read_text().count("\n") < 2:
            time.sleep(0.01)
        servers[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = bnntvm.tune(model, trials=10, database=tmp_path, rpc=f"{address[0]}:{address[1]}", key="test", progress=False)
    killer.join(5)
    assert (result.measured, result.failed) == (10, 0)
    assert len(client.boards(address, "test")) == 2
    assert len({(r.task, r.schedule) for r in records.read(tmp_path)[0]}) == 10
    assert not any(r.failed for r in records.read(tmp_path)[0])


def test_no_farm(tmp_path):
    with pytest.raises(bnntvm.BnnError, match="tracker does not answer"):
        client.boards(("127.0.0.1", 1), "test")
