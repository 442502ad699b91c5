"""Large pages: what is moved, and that nothing else is."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bnntvm import huge_pages

SIZE = huge_pages.SIZE


def _supported():
    """Whether this kernel makes large pages when it is asked to."""
    if not huge_pages.wanted():
        return False
    region = mmap.mmap(-1, 2 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region[:] = b"\1" * len(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    return huge_pages._libc().madvise(-(-address // SIZE) * SIZE, SIZE, 25) == 0


needs_large_pages = pytest.mark.skipif(not _supported(), reason="this kernel has no MADV_COLLAPSE, or no large pages")


def run(code, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HUGE = """
def huge():
    with open("/proc/self/smaps") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))
"""


@needs_large_pages
def test_what_comes_into_use_is_moved_and_keeps_its_contents():
    """Used before, used since, and mapped without being used: only the second is moved."""
    out = run(
        HUGE
        + """
import mmap
from bnntvm import huge_pages
blocks = [mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
contents = bytes(range(1, 251)) * 32768
blocks[0].write(contents)
watch = huge_pages.Watch()
blocks[1].write(contents)
made = watch.collapse()
print(made * 2048 == huge(), made, blocks[1][:len(contents)] == contents)
"""
    )
    same, made, kept = out.split()
    assert (same, kept) == ("True", "True") and 3 <= int(made) <= 4


@needs_large_pages
@pytest.mark.parametrize(("wanted", "made"), [("1", True), ("0", False)])
def test_networks_lie_in_large_pages_where_that_is_wanted(tmp_path, wanted, made):
    """Eight megabytes of weights that are no constants of a kernel of bits, in a process with as much free memory that has been in use.

    What is asked for is counted: the kernel may have no large pages left at that moment.
    """
    out = run(
        f"""
import numpy as np, onnx
from onnx import helper, numpy_helper
import bnntvm
from bnntvm import huge_pages
weight = np.random.default_rng(0).standard_normal((2048, 1024)).astype(np.float32)
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [helper.make_tensor_value_info("x", 1, ["N", 2048])],
                          [helper.make_tensor_value_info("y", 1, ["N", 1024])], [numpy_helper.from_array(weight, "w")])
bnntvm.build(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)).export({str(tmp_path / "n.bnn")!r})
huge_pages.gather()
used = [np.ones(1 << 20, np.uint8) for _ in range(33)]
del used[:-1]
libc, asked = huge_pages._libc(), []
real = libc.madvise
libc.madvise = lambda *args: (asked.append(args), real(*args))[1]
module = bnntvm.load({str(tmp_path / "n.bnn")!r}, threads=1)
x = np.ones((1, 2048), np.float32)
np.testing.assert_allclose(module(x), x @ weight, rtol=1e-3, atol=1e-3)
print(len({{start for start, size, advice in asked if (size, advice) == (2 << 20, 25)}}) >= 3)
""",
        BNNTVM_HUGE_PAGES=wanted,
    )
    assert out.strip() == str(made)


@needs_large_pages
def test_blocks_that_follow_each_other_lie_on_the_heap():
    out = run(
        """
        import ctypes
        from bnntvm import huge_pages
        huge_pages.gather()
        libc = huge_pages._libc()
        blocks = [libc.malloc(1 << 20) for _ in range(8)]
        heap = next(line for line in open("/proc/self/maps") if "[heap]" in line)
        low, high = (int(end, 16) for end in heap.split()[0].split("-"))
        print(all(low < block < high for block in blocks))
        """
    )
    assert out.strip() == "True"


def test_without_the_files_of_the_kernel_nothing_is_moved(monkeypatch):
    def closed(*_args, **_kwargs):
        raise PermissionError

    watch = huge_pages.Watch()
    monkeypatch.setattr("builtins.open", closed)
    assert watch.collapse() == 0
    assert huge_pages.Watch().before in ({}, None)


@pytest.mark.parametrize(("number", "calls", "made"), [(errno.EAGAIN, 4, False), (errno.ENOMEM, 1, False), (0, 1, True)])
def test_a_busy_kernel_is_asked_again(monkeypatch, number, calls, made):
    asked = []

    class Libc:
        @staticmethod
        def madvise(*args):
            asked.append(args)
            ctypes.set_errno(number)
            return -1 if number else 0

    monkeypatch.setattr(huge_pages, "_libc", Libc)
    assert huge_pages._collapsed(SIZE) == made and len(asked) == calls


def test_another_c_library_or_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(huge_pages, "_libc", lambda: None)
    watch = huge_pages.Watch()
    huge_pages.gather()
    huge_pages.trim()
    kept = np.ones(SIZE, np.uint8)
    assert watch.before is None and watch.collapse() == 0 and kept.all()
