"""Compiles a trained binary network, runs it on real handwritten digits, and shows what that brings.

    make demo

The network, ``data/digits_bnn.onnx``, was trained by ``train_digits.py``; the images are scikit-learn's, of which every fifth was kept out
of the training. ONNX Runtime, in float32, is the yardstick for results, speed and size.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime
from sklearn.datasets import load_digits

import bnntvm

MODEL = pathlib.Path(__file__).parent / "data" / "digits_bnn.onnx"
FRESH_PROCESS = """
import pathlib, sys
import bnntvm, numpy
module = bnntvm.load(sys.argv[1], threads=1)
classes = module(numpy.load(sys.argv[2])).argmax(1)
numpy.save(sys.argv[3], classes)
peak = int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(f"peak memory {peak:.0f} MiB, compiler mapped: {'libtvm_compiler' in pathlib.Path('/proc/self/maps').read_text()}")
"""


def held_out_digits():
    """The images that the training did not see, float32[359, 1, 8, 8] in [0, 1], and their labels."""
    digits = load_digits()
    return (digits.images[4::5] / 16).astype(np.float32)[:, None], digits.target[4::5]


def onnxruntime_session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def compare_speed(module, session, images):
    """Median times of both, measured in turns, for one image and for many."""
    for batch in (1, 64):
        feed = {"image": images[:batch]}
        ours, theirs = module.benchmark(feed, against=lambda feed=feed: session.run(None, feed))
        print(
            f"batch {batch:2d}, one thread: bnntvm {ours.median_ms * 1e3:7.1f} us, ONNX Runtime float32 {theirs.median_ms * 1e3:7.1f} us, "
            f"{theirs.median_ms / ours.median_ms:.1f} times as fast"
        )


def run_in_fresh_process(artefact, images, folder):
    """Classes that a process which only loads and runs the artefact finds."""
    np.save(folder / "images.npy", images)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, artefact, folder / "images.npy", folder / "classes.npy"], check=True)
    return np.load(folder / "classes.npy")


def main():
    images, labels = held_out_digits()

    start = time.perf_counter()
    module = bnntvm.build(MODEL, threads=1)
    print(f"built {MODEL.name} in {time.perf_counter() - start:.1f} s\n\n{module.report}\n")

    classes = module(images).argmax(1)
    session = onnxruntime_session()
    same = int((classes == session.run(None, {"image": images})[0].argmax(1)).sum())
    agree = f"same class as ONNX Runtime: {same} of {len(labels)}"
    print(f"accuracy on {len(labels)} held-out digits: {(classes == labels).mean():.2%}; {agree}\n")

    compare_speed(module, session, images)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        module.export(folder / "digits.bnn")
        size, onnx_size = (file.stat().st_size / 1000 for file in (folder / "digits.bnn", MODEL))
        print(f"\nartefact {size:.0f} kB, of it {module.report.constants_bytes / 1000:.0f} kB constants; ONNX file {onnx_size:.0f} kB")
        print("in a process of its own: ", end="", flush=True)
        again = run_in_fresh_process(folder / "digits.bnn", images, folder)
    print(f"the same classes there: {bool((again == classes).all())}")
    return 0 if same == len(labels) and (again == classes).all() else 1


if __name__ == "__main__":
    sys.exit(main())
