"""A board on this machine: networks run there as they do here, and what goes wrong there is told here."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnntvm
from benchmarks.layers import Layer
from bnntvm.remote import client

from .farm import farm

CRASH = """
#include <stdint.h>
#include <stdlib.h>
int32_t __tvm_ffi_crash(void *self, const void *args, int32_t count, void *result) { abort(); }
"""


@pytest.fixture(scope="module")
def address():
    with farm([[sys.executable]] * 2) as (address, _):  # one of them is kept by ``there``
        yield address


@pytest.fixture(scope="module")
def module():
    return bnntvm.build(Layer(32, 6).chain(1), threads=1)


@pytest.fixture(scope="module")
def there(address, module):
    return bnntvm.connect(address, "test").load(module)


@settings(max_examples=10)
@given(batch=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_runs_as_it_does_here(there, module, batch, seed):
    feed = module.random_feed(seed, batch)
    expected = module.run(feed)
    for name, array in there.run(feed).items():
        np.testing.assert_array_equal(array, expected[name])


def test_is_a_module(there, module, tmp_path):
    assert (there.inputs, there.outputs, there.report) == (module.inputs, module.outputs, module.report)
    timing = there.benchmark(repeat=20)
    assert timing.repeat == 20 and 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms
    with pytest.raises(bnntvm.InputError, match="takes"):
        there.run({info.name: np.zeros((1, 1, 1, 1), np.float32) for info in there.inputs})
    there.export(tmp_path / "network.bnn")
    assert bnntvm.load(tmp_path / "network.bnn").report == module.report


def test_another_machines_network_is_refused(address):
    board = bnntvm.connect(address, "test")
    with pytest.raises(bnntvm.TargetError, match="built for aarch64, the board .* is x86_64"):
        board.load(bnntvm.build(Layer(32, 6).chain(1), "aarch64"))


def test_a_session_that_crashes_is_not_the_boards_end(address, module, tmp_path):
    (tmp_path / "crash.c").write_text(CRASH)
    subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "crash.c"), "-o", str(tmp_path / "crash.so")], check=True)
    for _ in range(2):
        board = bnntvm.connect(address, "test")
        board.upload((tmp_path / "crash.so").read_bytes(), "crash.so")
        with pytest.raises(Exception):  # noqa: B017  (TVM has no type for it)
            board.session.load_module("crash.so")["crash"]()
    lost = bnntvm.connect(address, "test").load(module)
    with pytest.raises(Exception):  # noqa: B017
        lost.board.upload((tmp_path / "crash.so").read_bytes(), "crash.so")
        lost.board.session.load_module("crash.so")["crash"]()
    for use in (lost.benchmark, lambda: lost.run(module.random_feed()), lambda: lost.board.load(module)):
        with pytest.raises(bnntvm.BnnError):
            use()
    lost = None  # its board is free
    again = bnntvm.connect(address, "test").load(module)
    feed = module.random_feed()
    np.testing.assert_array_equal(*(list(one.run(feed).values())[0] for one in (again, module)))


def test_errors(address):
    with pytest.raises(bnntvm.BnnError, match="no board of this key"):
        bnntvm.connect(address, "other")
    with pytest.raises(bnntvm.BnnError, match="tracker does not answer"):
        bnntvm.connect("127.0.0.1:1", "test")
    with pytest.raises(bnntvm.BnnError, match="not host:port"):
        client.parse_address("nonsense")
