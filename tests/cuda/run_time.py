"""What a network does on a device, on one that is not there (:mod:`tests.cuda.fake`): ``python -m tests.cuda.run_time``."""

import contextlib
import ctypes
import os
import pathlib
import sys
import tempfile
import threading

import numpy as np

import bnntvm
from bnntvm.cuda import toolchain
from bnntvm.cuda.device import Device, Stopwatch
from bnntvm.cuda.tensor import DeviceArray, empty, part
from bnntvm.schedules.cuda import finite
from tests.cuda.fake import Fake
from tests.cuda.network import Network, long_layers

MODEL = pathlib.Path(__file__).with_name("data") / "exact_mlp.onnx"
IMAGES = pathlib.Path(__file__).parents[2] / "tutorials" / "data" / "digits_bnn.onnx"


class Session:
    """A model built for the device and for this processor, and which kernels a run calls."""

    def __init__(self, fake, model):
        self.fake, self.network = fake, Network(model, "sm_80")
        self.here, self.module = bnntvm.build(model, tuning=False), bnntvm.build(model, target="sm_80")

    def expect(self, feed, checked=True):
        """The kernels of a run on ``feed``."""
        self.network.run(feed)
        floats = [name for name, info in zip(feed, self.module.inputs) if info.dtype == "float32"] if checked else []
        flags = [(finite.NAME, [((feed[name].size,), "float32"), ((1,), "int32")], True) for name in floats]
        self.fake.expect(self.network, flags + self.network.calls)

    def same(self, feed, outputs=None):
        """A run gives what the kernels give one after the other, and, but for rounding, what this processor gives."""
        outputs = self.module.run(feed) if outputs is None else outputs
        self.fake.check()
        expected, here = self.network.run(feed), self.here.run(feed)
        for name in here:
            np.testing.assert_array_equal(np.asarray(outputs[name]), expected[name])
            np.testing.assert_allclose(expected[name], here[name], atol=1e-4)


def on_device(array):
    """A copy in the device's memory, as another library would hand it over."""
    from bnntvm.cuda import driver

    tensor = empty(array.shape, array.dtype, 0)
    driver.load().upload(tensor.data_ptr(), array.ctypes.data, array.nbytes, 0)
    return Foreign(tensor, array)


class Foreign:
    """An array of another library."""

    def __init__(self, tensor, host):
        self.tensor, self.host, self.shape, self.dtype = tensor, host, host.shape, str(host.dtype)
        self.streams = []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.tensor.__dlpack__()

    def numpy(self):
        return self.host


def host_arrays(session):
    """The second run is recorded, later ones are replayed; all results are right."""
    fake, recorded, replayed = session.fake, session.fake.recorded, session.fake.replayed
    feeds = [session.here.random_feed(seed=seed) for seed in range(4)]
    session.expect(feeds[0])
    for feed in feeds:
        session.same(feed)
    assert (fake.recorded, fake.replayed) == (recorded + 1, replayed + 3)
    assert session.module._idle[0].not_recorded is None


def batches(session):
    """Convolutions, whose tensors share storages. A larger batch needs larger ones: graphs that name the old ones are forgotten."""
    several = Session(session.fake, IMAGES)
    feeds = {batch: several.here.random_feed(batch=batch) for batch in (1, 2)}
    results = {batch: several.network.run(feed) for batch, feed in feeds.items()}
    recorded = several.fake.recorded
    for batch, graphs in ((1, 0), (1, 1), (1, 1), (2, 1), (2, 2), (1, 2), (1, 3)):
        several.expect(feeds[batch])
        for name, array in several.module.run(feeds[batch]).items():
            several.fake.check()
            np.testing.assert_array_equal(array, results[batch][name])
        assert several.fake.recorded == recorded + graphs


def several_kernels(session):
    """A layer of two kernels, which share memory of the plan, is recorded and replayed; a larger batch takes one kernel."""
    several = Session(session.fake, long_layers())
    feeds = {batch: several.here.random_feed(batch=batch) for batch in (1, 500)}
    for batch, recorded in ((1, 0), (1, 1), (1, 0), (500, 0), (1, 0)):
        several.expect(feeds[batch])
        before = several.fake.recorded
        several.same(feeds[batch])
        assert several.fake.recorded == before + recorded
    assert several.module._idle[0].not_recorded is None


def not_finite(session):
    """NaN and infinity are found on the device, named on the host, and do not stick."""
    feed = session.here.random_feed()
    session.expect(feed)
    for bad in (np.nan, np.inf):
        broken = {name: array.copy() for name, array in feed.items()}
        next(iter(broken.values())).reshape(-1)[7] = bad
        for _ in range(3):
            with contextlib.suppress(bnntvm.InputError):
                session.module.run(broken)
                raise AssertionError("it was not noticed")
        session.same(feed)
    session.expect(feed, checked=False)
    session.module.run({name: array * np.float32(np.nan) for name, array in feed.items()}, check_finite=False)


def device_arrays(session):
    """Arrays on the device are read where they are; so are results; memory that nobody holds is used again."""
    feed = session.here.random_feed()
    session.expect(feed, checked=False)
    there = {name: on_device(array) for name, array in feed.items()}
    for _ in range(4):
        outputs = session.module.run(there, check_finite=False)
        assert all(isinstance(one, DeviceArray) for one in outputs.values())
        session.same(feed, outputs)
        machine = session.module._idle[0]
        assert all(one.streams[-1] == machine.stream for one in there.values())
    first = next(iter(session.module.run(there, check_finite=False).values()))
    kept, address = np.from_dlpack(_OnHost(first)), first.data_ptr()
    value = kept.copy()
    second = next(iter(session.module.run(there, check_finite=False).values()))
    assert second.data_ptr() != address
    del first
    third = next(iter(session.module.run(there, check_finite=False).values()))
    assert third.data_ptr() != address, "a consumer still holds it"
    np.testing.assert_array_equal(kept, value)
    del kept, second, third
    (blocks,) = session.module._idle[0]._free._kept.values()
    count = len(blocks)
    for _ in range(6):
        session.module.run(there, check_finite=False)
    assert len(blocks) == count, "nobody holds the earlier ones"
    _inputs_are_kept(session, there)
    session.expect(feed)
    session.same(feed, session.module.run(there))  # with the check


def _inputs_are_kept(session, there):
    """While the device is at work on a run, nobody may get the memory of its inputs."""
    machine = session.module._idle[0]
    os.environ["FAKE_BUSY"] = "1"
    for _ in range(3):
        session.module.run(there, check_finite=False)
    assert len(machine._lent) >= 3
    os.environ.pop("FAKE_BUSY")
    session.module.run(there, check_finite=False)
    assert len(machine._lent) == 1


class _OnHost:
    """The fake device's memory is the host's: numpy may look at it."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(stream=1)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = get(capsule, b"dltensor")
        ctypes.c_int32.from_address(tensor + 8).value = 1  # DLTensor.device.device_type
        return capsule


def wrong_arrays(session):
    """What the network does not take is refused, with its name."""
    feed = session.here.random_feed()
    there = {name: on_device(array) for name, array in feed.items()}
    name, array = next(iter(there.items()))
    for change in ({"dtype": "float64"}, {"shape": (2, 3)}):
        other = Foreign(array.tensor, array.host)
        vars(other).update(change)
        with contextlib.suppress(bnntvm.InputError):
            session.module.run({name: other})
            raise AssertionError(f"{change} was taken")


def threads(session):
    """Several threads at once, each with a machine of its own."""
    feeds = [session.here.random_feed(seed=seed) for seed in range(3)]
    session.expect(feeds[0])
    results, problems = {}, []

    def work(number):
        try:
            for _ in range(3):
                results[number] = session.module.run(feeds[number])
        except BaseException as error:  # noqa: BLE001
            problems.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    session.fake.check()
    assert not problems, problems
    for number, outputs in results.items():
        session.same(feeds[number], outputs)


def artefact(session):
    """An exported network loads and runs; another architecture's, or an old driver, is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "net.bnn")
        session.module.export(path)
        loaded, feed = bnntvm.load(path), session.here.random_feed()
        session.expect(feed)
        session.same(feed, loaded.run(feed))
        assert loaded.report.target == "sm_80"
        assert loaded.benchmark(feed, repeat=3, warmup=2).repeat == 3
        from bnntvm.cuda import driver

        driver.load().capability.cache_clear()
        for variable, value, words in (("FAKE_MAJOR", "9", "sm_96"), ("FAKE_DRIVER", "12040", "12.4")):
            before = os.environ.get(variable)
            _setenv(variable, value)
            driver.load().capability.cache_clear()
            try:
                bnntvm.load(path)
                raise AssertionError(f"{variable}={value} was accepted")
            except bnntvm.TargetError as error:
                assert words in str(error), error
            finally:
                _setenv(variable, before or "13000")
        driver.load().capability.cache_clear()


def single_kernels(session):
    """A part of a tensor has an address of its own; events take the device's time."""
    device, pass_time = Device(), session.fake.libraries[1].pass_time
    pass_time.argtypes = [ctypes.c_double]
    numbers = np.arange(48, dtype=np.float32)
    whole = device.upload(numbers)
    piece = part(whole, 64, (4, 8), "float32")
    assert piece.data_ptr() == whole.data_ptr() + 64
    del whole
    np.testing.assert_array_equal(device.download(piece), numbers[16:].reshape(4, 8))
    watch = Stopwatch(device)
    pass_time(1.0)
    with watch.running():
        pass_time(2.5)
    pass_time(4.0)
    assert watch.read() == 2.5
    assert device.milliseconds(lambda: None) == 0 and device.driver.name(0) == "a device that is not there"
    recorded, calls = session.fake.recorded, []
    device.milliseconds(lambda: calls.append(0), count=3, repeat=2)
    assert session.fake.recorded == recorded + 1 and len(calls) == 4, "once, then recorded three times"


def _setenv(name, value):
    """C's getenv sees it."""
    os.environ[name] = value


CHECKS = (host_arrays, batches, not_finite, device_arrays, wrong_arrays, threads, artefact, single_kernels, several_kernels)


def main():
    """Run all checks; the first that fails ends the process."""
    os.environ |= {"FAKE_MAJOR": "8", "FAKE_MINOR": "6"}
    fake = Fake()
    toolchain.compile_source = fake.compile_source
    session = Session(fake, MODEL)
    for check in CHECKS:
        check(session)
        print("ok", check.__name__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
