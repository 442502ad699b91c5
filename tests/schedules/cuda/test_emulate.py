"""The emulator itself: it computes what threads compute, and reports what a sanitizer would."""

import numpy as np
import pytest
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import emulate, simt
from bnntvm.spec import WORKSPACE

THREADS = 64


def kernel(body, blocks=2):
    """A kernel of one uint32 result for each thread; ``body(thread, shared, result, index)`` returns statements."""
    out = tir.buffer("y", (blocks * THREADS,), "uint32")

    def whole(block, thread):
        memory, allocate = simt.shared(THREADS + 8)
        return [allocate, *body(thread, memory, out, block * THREADS + thread)]

    return simt.kernel("k", [out], blocks, THREADS, whole)


def run(body, **options):
    result = np.zeros(2 * THREADS, np.uint32)
    emulate.run(kernel(body), [result], **options)
    return result.reshape(2, THREADS)


def _exchange(thread, memory, out, index, wait=True):
    """Every thread reads what its counterpart has written."""
    return [
        simt.put(memory, thread, simt.u32(thread)),
        *([simt.sync()] if wait else []),
        simt.put(out, index, simt.at(memory, simt.i32(THREADS - 1) - thread)),
    ]


def test_threads_exchange_values_at_a_barrier():
    np.testing.assert_array_equal(run(_exchange), np.tile(np.arange(THREADS)[::-1], (2, 1)))


def test_a_race_is_found():
    with pytest.raises(emulate.Fault, match="race"):
        run(lambda *args: [*_exchange(*args), simt.put(args[1], args[0], simt.u32(0))])


def test_two_writers_are_a_race():
    with pytest.raises(emulate.Fault, match="race"):
        run(lambda thread, memory, out, index: [simt.put(memory, 3, simt.u32(1)), simt.put(out, index, simt.u32(0))])


def test_a_read_of_nothing_is_found():
    with pytest.raises(emulate.Fault, match="before it is written"):
        run(lambda *args: _exchange(*args, wait=False)[1:])


def test_a_read_before_the_barrier_is_a_race():
    with pytest.raises(emulate.Fault, match="race"):
        run(lambda *args: _exchange(*args, wait=False))


@pytest.mark.parametrize("shift", [-1, 2 * THREADS])
def test_an_access_outside_is_found(shift):
    with pytest.raises(emulate.Fault, match=r"store of y\["):
        run(lambda thread, memory, out, index: [simt.put(out, index + shift, simt.u32(0))])


def test_a_barrier_that_some_do_not_reach():
    with pytest.raises(emulate.Fault, match="elsewhere"):
        run(lambda thread, memory, out, index: [tirx.IfThenElse(thread < simt.i32(40), simt.sync(), None)])


def test_a_ballot_that_some_lanes_do_not_reach():
    def body(thread, memory, out, index):
        word, named = simt.bind("word", simt.call("bnn_ballot", thread < simt.i32(3)))
        return [tirx.IfThenElse(thread < simt.i32(40), tir.seq(named, simt.put(out, index, word)), None)]

    with pytest.raises(emulate.Fault, match="elsewhere"):
        run(body)


def test_branches_and_loops_of_different_length():
    def body(thread, memory, out, index):
        total, allocate = simt.registers("total", 1, "int32")
        step = simt.loop("i", simt.mod(thread, 5), lambda i: simt.put(total, 0, simt.at(total, 0) + i))
        store = simt.put(out, index, simt.u32(simt.at(total, 0)))
        skip = simt.put(out, index, simt.u32(99))
        return [allocate, simt.put(total, 0, simt.i32(0)), step, tirx.IfThenElse(thread < simt.i32(50), store, skip)]

    wanted = np.where(np.arange(THREADS) < 50, [sum(range(t % 5)) for t in range(THREADS)], 99)
    np.testing.assert_array_equal(run(body), np.tile(wanted, (2, 1)))


def _copied(wait):
    """A kernel that copies 16 bytes asynchronously, by one thread of every four, and reads them back."""

    def body(thread, memory, out, index):
        first = simt.div(thread, 4) * 4
        own = tirx.EQ(simt.mod(thread, 4), simt.i32(0))
        fill = simt.put(memory, thread, simt.u32(7))
        copy = simt.do("bnn_copy_async4", simt.pointer(memory, first), simt.pointer(out, index), tir.constant(True, "bool"))
        done = [simt.do("bnn_copy_commit"), *([simt.do("bnn_copy_wait0")] if wait else []), simt.sync()]
        read = simt.put(out, index, simt.at(memory, thread))
        return [fill, simt.sync(), tirx.IfThenElse(own, copy, None), *done, read]

    return body


def test_copies_arrive_when_they_are_waited_for():
    assert (run(_copied(wait=True)) == 0).all()


def test_copies_that_are_not_waited_for_are_late():
    assert (run(_copied(wait=False)) == 7).all()


def test_roles_wait_for_each_other():
    """One warp makes numbers, the other takes them: a ring of two places."""

    def body(thread, memory, out, index):
        full, empty = (lambda i: simt.pointer(memory, i * 2 + THREADS)), (lambda i: simt.pointer(memory, i * 2 + (THREADS + 4)))
        lane = simt.mod(thread, 32)
        init = [simt.do("bnn_barrier_init", one(simt.i32(i)), simt.i32(32)) for one in (full, empty) for i in range(2)]

        def make(i):
            place = simt.mod(i, 2)
            wait = simt.do("bnn_barrier_wait", empty(place), simt.mod(simt.div(i, 2) + 1, 2))
            return [wait, simt.put(memory, place * 32 + lane, simt.u32(i * 100 + lane)), simt.do("bnn_barrier_arrive", full(place))]

        total, allocate = simt.registers("total", 1, "uint32")

        def take(i):
            place = simt.mod(i, 2)
            wait = simt.do("bnn_barrier_wait", full(place), simt.mod(simt.div(i, 2), 2))
            add = simt.put(total, 0, simt.at(total, 0) + simt.at(memory, place * 32 + lane))
            return [wait, add, simt.do("bnn_barrier_arrive", empty(place))]

        maker = tir.seq(simt.loop("i", 5, make), simt.put(out, index, simt.u32(0)))
        taker = tir.seq(allocate, simt.put(total, 0, simt.u32(0)), simt.loop("i", 5, take), simt.put(out, index, simt.at(total, 0)))
        first = tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(init), None)
        return [first, simt.sync(), simt.roles(thread < simt.i32(32), maker, taker)]

    wanted = np.r_[np.zeros(32), 1000 + 5 * np.arange(32)]
    np.testing.assert_array_equal(run(body), np.tile(wanted, (2, 1)))


def test_roles_that_wait_for_ever():
    def body(thread, memory, out, index):
        bar = simt.pointer(memory, THREADS)
        init = tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), simt.do("bnn_barrier_init", bar, simt.i32(64)), None)
        wait = simt.do("bnn_barrier_wait", bar, simt.i32(0))
        return [init, simt.sync(), simt.roles(thread < simt.i32(32), tir.seq(simt.do("bnn_barrier_arrive", bar), wait), tir.seq(wait))]

    with pytest.raises(emulate.Fault, match="deadlock"):
        run(body)


def test_a_role_that_does_not_wait_races():
    def body(thread, memory, out, index):
        write = simt.put(memory, simt.mod(thread, 32), simt.u32(1))
        read = simt.put(out, index, simt.at(memory, simt.mod(thread, 32)))
        return [simt.roles(thread < simt.i32(32), tir.seq(write), tir.seq(read))]

    with pytest.raises(emulate.Fault, match="race"):
        run(body)


ANY_ORDER = pytest.mark.parametrize("order", [None, 0, 1, 2, 3])


def _neighbours(thread, memory, out, index, meet=True, stay=True, spoil=False):
    """Every thread reads what its counterpart in the other block of its cluster has written."""
    rank = simt.mod(simt.div(index, THREADS), 2)
    other = simt.call("bnn_load_other", simt.pointer(memory, simt.i32(THREADS - 1) - thread), simt.i32(1) - rank)
    return [
        simt.put(memory, thread, simt.u32(index)),
        simt.do("bnn_cluster_sync") if meet else simt.sync(),
        simt.put(out, index, other),
        *([simt.put(memory, thread, simt.u32(0))] if spoil else []),
        *([simt.do("bnn_cluster_sync")] if stay else []),
    ]


def run_clusters(order, **options):
    """Two clusters of two blocks."""
    out, result = tir.buffer("y", (4 * THREADS,), "uint32"), np.zeros(4 * THREADS, np.uint32)

    def whole(block, thread):
        memory, allocate = simt.shared(THREADS)
        return [allocate, *_neighbours(thread, memory, out, block * THREADS + thread, **options)]

    emulate.run(simt.kernel("k", [out], 4, THREADS, whole, cluster=2), [result], order=order)
    return result.reshape(4, THREADS)


@ANY_ORDER
def test_blocks_of_a_cluster_exchange_values(order):
    wanted = np.arange(4 * THREADS).reshape(2, 2, THREADS)[:, ::-1, ::-1]
    np.testing.assert_array_equal(run_clusters(order), wanted.reshape(4, THREADS))


@ANY_ORDER
def test_a_read_before_the_cluster_has_met_is_found(order):
    with pytest.raises(emulate.Fault, match="race|before it is written"):
        run_clusters(order, meet=False)


@ANY_ORDER
def test_memory_that_another_block_reads_is_not_written(order):
    with pytest.raises(emulate.Fault, match="race"):
        run_clusters(order, spoil=True)


@ANY_ORDER
def test_a_block_stays_while_others_read_its_memory(order):
    with pytest.raises(emulate.Fault, match="after its end"):
        run_clusters(order, stay=False)


@ANY_ORDER
def test_a_cluster_of_which_not_all_come(order):
    out, result = tir.buffer("y", (4 * THREADS,), "uint32"), np.zeros(4 * THREADS, np.uint32)

    def whole(block, thread):
        meet = tirx.IfThenElse(tirx.EQ(simt.mod(block, 2), simt.i32(0)), simt.do("bnn_cluster_sync"), None)
        return [simt.put(out, block * THREADS + thread, simt.u32(1)), meet]

    with pytest.raises(emulate.Fault, match="deadlock"):
        emulate.run(simt.kernel("k", [out], 4, THREADS, whole, cluster=2), [result], order=order)


def two_kernels(first, second=None, same=False):
    """One or two kernels of two blocks and a workspace of four words; bodies get ``(block, workspace, result)``."""
    out, work = tir.buffer("y", (4,), "uint32"), tir.buffer("parts", (4,), "int32")
    made = [simt.kernel("k", [out, work], 2, 32, lambda block, _, f=f: f(block, work, out)) for f in (first, second) if f]
    function = made[0] if len(made) == 1 else simt.both(*made)
    result = np.zeros(4, np.uint32)
    emulate.run(function.with_attr(WORKSPACE, 4), [result], blocks_at_once=1)
    return result


def leave(block, work, out):
    return [simt.put(work, block, block + 5)]


def take(block, work, out):
    return [simt.put(out, block, simt.u32(simt.at(work, simt.i32(1) - block)))]


def test_a_second_kernel_sees_what_blocks_of_the_first_have_left():
    np.testing.assert_array_equal(two_kernels(leave, take), [6, 5, 0, 0])


@pytest.mark.parametrize("first, second, why", [
    (lambda *a: leave(*a) + take(*a), None, "before it is written"),  # block 0 reads what block 1 has not written yet
    (lambda *a: leave(*a) + [simt.put(a[1], simt.i32(3) - a[0], a[0])] + [simt.put(a[2], a[0], simt.u32(simt.at(a[1], 3 - a[0] * 3)))],
     None, "race: block 1 reads"),
    (lambda block, work, out: [simt.put(work, 0, block)], None, "race: block 1 writes"),
    (leave, lambda *a: take(*a) + [simt.put(a[1], simt.i32(3) - a[0] * 2, a[0])], "race: block 1 writes"),  # what block 0 has read
    (leave, lambda block, work, out: [simt.put(out, 0, simt.u32(simt.at(work, block + 1)))], "before it is written"),
], ids=["early", "within", "two_writers", "read_by_another", "not_left"])  # fmt: skip
def test_blocks_of_a_launch_do_not_meet_in_memory(first, second, why):
    with pytest.raises(emulate.Fault, match=why):
        two_kernels(first, second)


def test_blocks_may_write_the_same():
    """As those that have found something do."""
    assert two_kernels(lambda block, work, out: [simt.put(out, 2, simt.u32(1))])[2] == 1


def test_wrong_arrays_are_refused():
    function = kernel(_exchange)
    with pytest.raises(emulate.Fault, match="uint32, not int32"):
        emulate.run(function, [np.zeros(2 * THREADS, np.int32)])
    with pytest.raises(emulate.Fault, match="shape"):
        emulate.run(function, [np.zeros(THREADS, np.uint32)])
