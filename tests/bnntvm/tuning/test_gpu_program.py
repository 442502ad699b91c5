"""What the measuring program makes of times; what it does on a device is in test_gpu."""

import io
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bnntvm.tuning import cases, gpu_program, worker
from bnntvm.tuning.task import Operand, Task


def task(growth, shape=(1, 8, 8, 64), dtype="float32"):
    one = Operand(shape, dtype, growth=growth)
    return Task("id", "key", "family", None, None, (one, Operand((3, 3, 64, 64), "float32")), (one,))


def test_batches():
    """One and several images, fewer of the larger batch where it is large; one where the batch has a size, or is no leading dimension."""
    assert gpu_program.batches(task((1, 0, 0, 0))) == gpu_program.BATCHES
    large = gpu_program.batches(task((1, 0, 0, 0), (1, 1024, 1024, 64)))
    assert large == (1, gpu_program.MOST_BYTES // (2 * 4 * 64 << 20))
    for growth in ((), (0, 0, 0, 0), (0, 8, 0, 0), (2, 0, 0, 0)):
        assert gpu_program.batches(task(growth)) == (1,)


def test_larger_batches_repeat_the_images():
    images = np.arange(2 * 3 * 4).reshape(6, 4)  # two images of three rows
    operand = Operand((3, 4), "int64", growth=(3, 0))
    assert cases.resized(operand, images, 1).tolist() == images[:3].tolist()
    assert cases.resized(operand, images, 5).tolist() == np.concatenate([images, images, images[:3]]).tolist()
    assert cases.resized(Operand((6, 4), "int64"), images, 5) is images and cases.resized(operand, None, 5) is None


def test_a_case_has_its_images():
    """Operands and outputs of a case have so many images, and batches made of it what the reference says of each."""
    from bnntvm import spec as sp
    from bnntvm.schedules import families
    from bnntvm.targets import cuda

    isa, spec = cuda.level("sm_80"), sp.Softmax(5)
    one = Operand((3, 5), "float32", growth=(3, 0))
    made = Task("id", "key", "reduce", spec, isa, (one,), (one,))
    operands, _, expected = cases.make(made, images=2)
    assert operands[0].shape == expected[0].shape == (6, 5)
    many = cases.resized(one, operands[0], 7)
    np.testing.assert_array_equal(families.of(spec, isa).reference(spec, [many], [])[0], cases.resized(one, expected[0], 7))


def test_a_candidate_counts_by_its_worst_batch(monkeypatch):
    """One that gains much with one image and loses with many must not look faster than the default."""
    noise = [0.1e-6, 5e-6] * 6, [5e-6, 0.1e-6] * 6
    times = {1: [[1e-6] * 12, [0.2e-6] * 12, [0.9e-6] * 12], 64: [[9e-6] * 12, [10e-6] * 12, [7.2e-6] * 12]}
    monkeypatch.setattr(worker, "load", lambda folder: (task((1, 0, 0, 0)),))
    monkeypatch.setattr(worker, "take_turns", lambda loaded, where, seconds: times[where.images])
    device = SimpleNamespace(library=lambda path: lambda name: path)
    default, narrow, good = gpu_program.compare(device, [("folder", str(i)) for i in range(3)], 0.1)
    assert default == pytest.approx([3e-6] * 6)
    assert narrow == pytest.approx([3e-6 * 10 / 9] * 6) and good == pytest.approx([3e-6 * 0.9] * 6)
    times = {1: [noise[0], noise[1]], 64: [[9e-6] * 12, [7.2e-6] * 12]}
    default, other = gpu_program.compare(device, [("folder", str(i)) for i in range(2)], 0.1)
    assert other == default, "where the device was too busy with one batch, no gain is claimed for the other"


def test_times_of_batches_are_averaged_geometrically():
    assert gpu_program._together([[1.0, 4.0], [9.0, 4.0]]) == pytest.approx([2.0, 6.0])


def test_messages():
    """Whole values come through, one after the other; an end within one is an end."""
    file = io.BytesIO()
    for value in (("measure", "folder"), {"x": np.arange(3)}):
        gpu_program.write(file, value)
    data = file.getvalue()
    file.seek(0)
    assert gpu_program.read(file.read) == ("measure", "folder") and gpu_program.read(file.read)["x"].tolist() == [0, 1, 2]
    for cut in (0, 3, 8, 20, len(data) - 60):
        part = io.BytesIO(data[:cut])
        with pytest.raises(EOFError):
            while True:
                gpu_program.read(part.read)


def test_it_needs_no_compiler():
    """A device may be beside a machine where nothing but the run time is, and a program that failed is replaced at once."""
    code = (
        "import sys, bnntvm.tuning.gpu_process, bnntvm.tuning.task, bnntvm.tuning.cases;"
        "assert not {'tvm', 'onnx', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[3])
