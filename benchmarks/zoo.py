"""Published binary networks as ONNX, with seeded random weights.

``build(name)`` gives an `onnx.ModelProto` (opset 17, NCHW, batch ``N``, input ``input``, output ``output``), spelled as an exporter would:
float convolutions with their BatchNormalization folded in, binary weights as initializers that hold +-1 (or +-alpha), activations as
Sign(Sign(x) + 0.1), Where(x >= 0, 1, -1) or a plain Sign. Statistics of every BatchNormalization are those of random images, so signs are
balanced and no layer saturates.

From a shell: ``python -m benchmarks.zoo quicknet quicknet.onnx``.

============================= ====================================================== =========== ========== ==========
network                       paper                                                  binary MACs float MACs parameters
============================= ====================================================== =========== ========== ==========
binary_resnet_e18             Back to Simplicity, arXiv 1906.08637                       1676 M      138 M     11.7 M
birealnet18                   Bi-Real Net, arXiv 1808.00278                              1676 M      138 M     11.7 M
quicknet_small                Larq Compute Engine, arXiv 2011.09398                      1156 M       16 M     12.7 M
quicknet                      the same                                                   1850 M       30 M     13.2 M
quicknet_large                the same                                                   3699 M       30 M     23.4 M
binary_densenet28             Back to Simplicity, arXiv 1906.08637                       3587 M      202 M      5.2 M
meliusnet22                   MeliusNet, arXiv 2001.05936                                4624 M      136 M      7.0 M
xnornet_alexnet               XNOR-Net, arXiv 1603.05279 (without the map K, as the      1026 M      113 M     62.4 M
                              authors' released network and Larq's)
binarynet_vgg                 Binarized Neural Networks, arXiv 1602.02830                 613 M        4 M     14.0 M
reactnet_a                    ReActNet, arXiv 2003.03488                                 4817 M       12 M     29.4 M
real_to_binary18              Real-to-Binary Convolutions, arXiv 2003.11535              1676 M      138 M     12.0 M
============================= ====================================================== =========== ========== ==========

MACs are those of one image; padded taps count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from .netbuilder import NetBuilder, Value

IMAGE = (3, 224, 224)
CIFAR = (3, 32, 32)
SECTION_FILTERS = (64, 128, 256, 512)
BLUR = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16


def resnet_stem(net: NetBuilder, *, relu: bool, pads: str | int = "same", shift: float = 0.0) -> Value:
    """7x7 stride 2 convolution to 64 channels, ReLU or none, 3x3 stride 2 max-pool: 224 x 224 to 56 x 56."""
    x = net.conv(net.input, 64, 7, stride=2, pads=3 if pads != "same" else "same", shift=shift)
    if relu:
        x = net.node("Relu", [x])
    return net.max_pool(x, 3, 2, pads)


def shortcut(net: NetBuilder, x: Value, filters: int) -> Value:
    """The way around a block that halves the image: 2x2 average, then a float 1x1 convolution with BatchNormalization."""
    return net.conv(net.average_pool(x, 2, 2), filters, 1)


def resnet18_strides() -> list[tuple[int, int]]:
    """(filters, stride) of the sixteen 3x3 convolutions of a ResNet-18."""
    return [(filters, 2 if filters > 64 and i == 0 else 1) for filters in SECTION_FILTERS for i in range(4)]


def binary_resnet_e18() -> onnx.ModelProto:
    """BinaryResNetE18: a shortcut around every binary convolution, full-precision 1x1 convolutions where the image shrinks."""
    net = NetBuilder("binary_resnet_e18", IMAGE, seed=1)
    x = net.batchnorm(resnet_stem(net, relu=True))
    for filters, stride in resnet18_strides():
        way = x if stride == 1 else shortcut(net, x, filters)
        x = net.node("Add", [net.batchnorm(net.binary_conv(x, filters, 3, stride=stride)), way])
    return net.model(net.classifier(net.node("Relu", [x])))


def birealnet18() -> onnx.ModelProto:
    """Bi-Real-18, as PyTorch writes it: plain Sign, weights +-alpha per filter, symmetric padding, no ReLU in the stem."""
    net = NetBuilder("birealnet18", IMAGE, seed=2, sign="torch")
    # The maximum of nine neighbours is about 1.2 deviations above their mean: the shift keeps the first signs balanced.
    x = resnet_stem(net, relu=False, pads=1, shift=-1.2)
    for filters, stride in resnet18_strides():
        way = x if stride == 1 else shortcut(net, x, filters)
        x = net.node("Add", [net.batchnorm(net.binary_conv(x, filters, 3, stride=stride, pads=1, scaled=True)), way])
    return net.model(net.classifier(x, softmax=False))


def _quicknet(name: str, filters: tuple[int, ...], blocks: tuple[int, ...], seed: int) -> onnx.ModelProto:
    """QuickNet: residual blocks of binary 3x3, ReLU, BatchNormalization; float blur-pool and 1x1 between the sections."""
    net = NetBuilder(name, IMAGE, seed=seed)
    x = net.node("Relu", [net.conv(net.input, filters[0] // 4, 3, stride=2)])
    x = net.conv(x, x.channels, 3, stride=2, groups=x.channels)
    x = net.conv(x, filters[0], 1)
    for section, (width, count) in enumerate(zip(filters, blocks)):
        if section:
            x = net.max_pool(net.node("Relu", [x]), 2, 1)
            blur = np.broadcast_to(BLUR, (x.channels, 1, 3, 3)).copy()
            x = net.conv(x, x.channels, 3, stride=2, pads=1, groups=x.channels, weights=blur, bn=False)
            x = net.conv(x, width, 1)
        for _ in range(count):
            y = net.node("Relu", [net.binary_conv(x, width, 3, pad_one=True)])
            x = net.node("Add", [net.batchnorm(y), x])
    return net.model(net.classifier(net.node("Relu", [x])))


def quicknet_small() -> onnx.ModelProto:
    """QuickNetSmall."""
    return _quicknet("quicknet_small", (32, 64, 256, 512), (4, 4, 4, 4), seed=3)


def quicknet() -> onnx.ModelProto:
    """QuickNet."""
    return _quicknet("quicknet", SECTION_FILTERS, (4, 4, 4, 4), seed=4)


def quicknet_large() -> onnx.ModelProto:
    """QuickNetLarge."""
    return _quicknet("quicknet_large", SECTION_FILTERS, (6, 8, 12, 6), seed=5)


def binary_densenet28() -> onnx.ModelProto:
    """BinaryDenseNet28: every binary convolution adds 64 channels by concatenation; float 1x1 between the sections."""
    net = NetBuilder("binary_densenet28", IMAGE, seed=6, sign="where")
    x = resnet_stem(net, relu=True)
    for count, reduction in zip((6, 6, 6, 5), (2.7, 2.7, 2.2, None)):
        for _ in range(count):
            x = net.node("Concat", [x, net.binary_conv(net.batchnorm(x), 64, 3)], axis=1)
        x = net.batchnorm(x)
        if reduction:
            x = net.node("Relu", [net.max_pool(x, 2, 2)])
            x = net.conv(x, round(x.channels // reduction / 32) * 32, 1, bn=False)
    return net.model(net.classifier(net.node("Relu", [x])))


def _improve(net: NetBuilder, x: Value) -> Value:
    """MeliusNet's improvement block: a binary convolution is added to the 64 newest channels."""
    y = net.binary_conv(net.batchnorm(x), 64, 3)
    cut, end, axis = (net.constant(np.array([v], np.int64), "index") for v in (x.channels - 64, x.channels, 1))
    old = net.node("Slice", [x, net.constant(np.array([0], np.int64), "index"), cut, axis])
    new = net.node("Slice", [x, cut, end, axis])
    return net.node("Concat", [old, net.node("Add", [new, y])], axis=1)


def meliusnet22() -> onnx.ModelProto:
    """MeliusNet22: dense blocks and improvement blocks in turn, a grouped stem, float 1x1 between the sections."""
    net = NetBuilder("meliusnet22", IMAGE, seed=7)
    x = net.node("Relu", [net.conv(net.input, 32, 3, stride=2)])
    x = net.node("Relu", [net.conv(x, 32, 3, groups=4)])
    x = net.node("Relu", [net.conv(x, 64, 3, groups=8)])
    x = net.max_pool(x, 2, 2)
    for count, features in zip((4, 5, 4, 4), (160, 224, 256, None)):
        for _ in range(count):
            x = net.node("Concat", [x, net.binary_conv(net.batchnorm(x), 64, 3)], axis=1)
            x = _improve(net, x)
        x = net.batchnorm(x)
        if features:
            x = net.node("Relu", [net.max_pool(x, 2, 2)])
            x = net.conv(x, features, 1, bn=False)
    return net.model(net.classifier(net.node("Relu", [x])))


def xnornet_alexnet() -> onnx.ModelProto:
    """XNOR-Net on AlexNet, weights +-alpha per filter; the first and the last layer are float."""
    net = NetBuilder("xnornet_alexnet", IMAGE, seed=8, samples=4)
    x = net.node("Relu", [net.conv(net.input, 96, 11, stride=4)])
    x = net.batchnorm(net.max_pool(x, 3, 2))
    x = net.batchnorm(net.max_pool(net.binary_conv(x, 256, 5, scaled=True), 3, 2))
    x = net.batchnorm(net.binary_conv(x, 384, 3, scaled=True))
    x = net.batchnorm(net.binary_conv(x, 384, 3, scaled=True))
    x = net.batchnorm(net.max_pool(net.binary_conv(x, 256, 3, scaled=True), 3, 2))
    x = net.batchnorm(net.binary_conv(x, 4096, 6, scaled=True, pads=0))
    x = net.batchnorm(net.binary_conv(x, 4096, 1, scaled=True))
    x = net.node("Flatten", [net.node("Relu", [x])], axis=1)
    return net.model(net.node("Softmax", [net.dense(x, 1000, bias=False)], axis=-1))


def binarynet_vgg() -> onnx.ModelProto:
    """BinaryNet's VGG for CIFAR-10: six binary-weight 3x3 convolutions (the first on the float image) and three dense layers."""
    net = NetBuilder("binarynet_vgg", CIFAR, seed=9, samples=16)
    first = net.conv(net.input, 128, 3, bn=False, weights=net.binary_weights((128, 3, 3, 3)))
    x = net.batchnorm(first)
    for i, filters in enumerate((128, 256, 256, 512, 512)):
        y = net.binary_conv(x, filters, 3)
        x = net.batchnorm(net.max_pool(y, 2, 2) if i % 2 == 0 else y)
    x = net.node("Flatten", [x], axis=1)
    for units in (1024, 1024, 10):
        x = net.batchnorm(net.binary_dense(x, units))
    return net.model(net.node("Softmax", [x], axis=-1))


def _rprelu(net: NetBuilder, x: Value) -> Value:
    """ReActNet's RPReLU: bias, PReLU, bias."""
    return net.channel_bias(net.prelu(net.channel_bias(x)))


def _reactnet_block(net: NetBuilder, x: Value, filters: int, stride: int) -> Value:
    """Binary 3x3 with a shortcut, then binary 1x1: two of them side by side where the channels double."""
    way = x if stride == 1 else net.average_pool(x, 2, 2)
    y = net.batchnorm(net.binary_conv(net.channel_bias(x, centre=True), x.channels, 3, stride=stride, pads=1, scaled=True))
    x = _rprelu(net, net.node("Add", [y, way]))
    bits = net.sign(net.channel_bias(x, centre=True))
    halves = []
    for _ in range(filters // x.channels):
        y = net.batchnorm(net.conv_of_bits(bits, x.channels, 1, pads=0, scaled=True))
        halves.append(net.node("Add", [y, x]))
    return _rprelu(net, halves[0] if len(halves) == 1 else net.node("Concat", halves, axis=1))


def reactnet_a() -> onnx.ModelProto:
    """ReActNet-A: a MobileNet of binary 3x3 and 1x1 convolutions with RSign and RPReLU."""
    net = NetBuilder("reactnet_a", IMAGE, seed=10, sign="torch")
    x = net.conv(net.input, 32, 3, stride=2, pads=1)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for filters, stride in plan:
        x = _reactnet_block(net, x, filters, stride)
    return net.model(net.classifier(x, softmax=False))


def _gate(net: NetBuilder, x: Value, filters: int) -> Value:
    """Real-to-binary's data-dependent scale: average, dense to C/8, ReLU, dense, sigmoid; [N, filters, 1, 1]."""
    z = net.node("Flatten", [net.node("GlobalAveragePool", [x])], axis=1)
    z = net.dense(z, x.channels // 8, bias=False, relu=True)
    z = net.node("Sigmoid", [net.dense(z, filters, bias=False)])
    return net.node("Reshape", [z, net.constant(np.array([-1, filters, 1, 1], np.int64), "shape")])


def real_to_binary18() -> onnx.ModelProto:
    """Real-to-Binary ResNet-18: BatchNormalization, binary 3x3, a scale computed from the input, PReLU, shortcut."""
    net = NetBuilder("real_to_binary18", IMAGE, seed=11, sign="where")
    x = net.max_pool(net.prelu(net.conv(net.input, 64, 7, stride=2)), 3, 2, "same")
    for filters, stride in resnet18_strides():
        way = x if stride == 1 else shortcut(net, x, filters)
        y = net.batchnorm(x)
        scaled = net.node("Mul", [net.binary_conv(y, filters, 3, stride=stride), _gate(net, y, filters)])
        x = net.node("Add", [net.prelu(scaled), way])
    return net.model(net.classifier(x))


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f
    for f in (
        binary_resnet_e18,
        birealnet18,
        quicknet_small,
        quicknet,
        quicknet_large,
        binary_densenet28,
        meliusnet22,
        xnornet_alexnet,
        binarynet_vgg,
        reactnet_a,
        real_to_binary18,
    )
}
NAMES = tuple(NETWORKS)


def build(name: str) -> onnx.ModelProto:
    """Build a published network.

    Parameters
    ----------
    name : str
        One of `NAMES`.

    Returns
    -------
    onnx.ModelProto
        Input ``input`` float32[N, 3, H, W], output ``output`` float32[N, classes].
    """
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r} in the zoo; it has {', '.join(NAMES)}")
    return NETWORKS[name]()


@dataclass(frozen=True)
class Size:
    """What a network costs for one image.

    Attributes
    ----------
    binary_macs : int
        Multiply-accumulates of layers whose weights have two levels and whose input is +-1, padded taps counted.
    float_macs : int
        The others'.
    parameters : int
        Elements of all initializers that have a channel axis.
    """

    binary_macs: int
    float_macs: int
    parameters: int


def size_of(model: onnx.ModelProto) -> Size:
    """Count MACs and parameters of a network whose weights are initializers."""
    shapes = _static_shapes(model)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    producers = {n.output[0]: n for n in model.graph.node}
    binary = float_ = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        macs = weight.size * int(np.prod(shapes[node.output[0]][2:], dtype=np.int64)) if node.op_type == "Conv" else weight.size
        source = producers.get(node.input[0])
        while source is not None and source.op_type in ("Pad", "Transpose"):
            source = producers.get(source.input[0])
        if source is not None and source.op_type in ("Sign", "Where"):
            binary += macs
        else:
            float_ += macs
    return Size(binary, float_, sum(w.size for w in weights.values() if w.size > 8))


def _static_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of all values of a model for a batch of one."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in [*fixed.graph.input, *fixed.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(fixed).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def main(arguments: list[str]) -> int:
    """Write one network to a file, or list them."""
    if len(arguments) != 2:
        print("usage: python -m benchmarks.zoo NETWORK FILE.onnx\nnetworks: " + ", ".join(NAMES), file=sys.stderr)
        return 2
    onnx.save(build(arguments[0]), arguments[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
