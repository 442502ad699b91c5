"""Tunes one layer of a binary network and shows how the search went.

    pip install '.[tune]' && python tutorials/tune_layer.py

The layer is a 3x3 convolution of 256 channels on a 14x14 image, as in the third stage of a ResNet-18. bnntvm compiles it with a schedule
that is chosen by rule: how many pixels and output channels a register tile has, which instructions count the bits, in what pieces the
work is done. A tuner tries others on this very processor. It measures the default first, asks a cost model (XGBoost) which candidates
look promising, builds and checks those, measures, and learns; two minutes are enough for a layer.

The records end up in a folder, which a build can use for every network that has such a layer::

    module = bnntvm.build("network.onnx", tuning="layer.tune")
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import bnntvm


def layer(channels, size):
    """An ONNX model of sign, a 3x3 convolution with weights +-1, and batch normalisation; float32[1, channels, size, size] in and out."""
    rng = np.random.default_rng(0)
    sign = np.where(rng.standard_normal((channels, channels, 3, 3)) < 0, -1, 1).astype(np.float32)
    constants = {
        "zero": np.float32(0), "one": np.float32(1), "minus": np.float32(-1), "weight": sign,
        "gamma": rng.uniform(0.5, 1.5, channels).astype(np.float32), "beta": rng.standard_normal(channels).astype(np.float32),
        "mean": rng.standard_normal(channels).astype(np.float32), "var": np.full(channels, 9 * channels, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Less", ["x", "zero"], ["negative"]),
        helper.make_node("Where", ["negative", "minus", "one"], ["bits"]),
        helper.make_node("Conv", ["bits", "weight"], ["sum"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["sum", "gamma", "beta", "mean", "var"], ["y"]),
    ]
    shape = [1, channels, size, size]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--database", type=pathlib.Path, default=pathlib.Path("layer.tune"))
    options = parser.parse_args(arguments)

    model = layer(options.channels, options.size)
    result = bnntvm.tune(model, trials=options.trials, time_limit=options.seconds, database=options.database, layers="binary_conv2d")
    row = result.rows[0]
    print(f"{result.measured} candidates measured, {result.failed} failed, in {result.seconds:.0f} s")
    print(
        f"default {row.default_us:.1f} us, best {row.best_us:.1f} us, {row.default_us / row.best_us:.2f} times as fast:\n  {row.schedule}"
    )

    # The same as on the command line: the table, and a picture with the curve.
    picture = options.database / "search.png"
    subprocess.run([sys.executable, "-m", "bnntvm", "tune", "show", str(options.database), "--plot", str(picture)], check=True)

    # What was tuned is what is built, and it computes the same.
    default, tuned = (bnntvm.build(model, threads=1, tuning=choice) for choice in (False, options.database))
    feed = default.random_feed()
    same = all(np.array_equal(default.run(feed)[name], array) for name, array in tuned.run(feed).items())
    before, after = default.benchmark(feed, against=lambda: tuned.run(feed))
    print(f"the whole module: {before.median_ms:.3f} ms before, {after.median_ms:.3f} ms after; equal results: {same}")


if __name__ == "__main__":
    onnx.checker.check_model(layer(8, 4))
    main(sys.argv[1:])
