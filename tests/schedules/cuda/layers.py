"""Run layers of bits through the emulator and compare with numpy; random specifications come from the tests of the CPU families."""

import numpy as np

from bnntvm.schedules import epilogue, families
from bnntvm.schedules.cuda import emulate
from bnntvm.spec import BinaryConv2d, PlanesConv2d
from bnntvm.targets import cuda
from tests.schedules import planes as random_planes
from tests.schedules import test_binary_conv2d, test_bitserial_conv2d
from tests.schedules.kernels import epilogue_inputs

LEVELS = {level.name: level for level in cuda.LEVELS}
NEWER = cuda.resolve("sm_120")


def operands(spec, batch, rng):
    """Random operands with canonical weights."""
    if isinstance(spec, BinaryConv2d):
        return test_binary_conv2d.operands(spec, batch, rng, (0,))[0]
    if isinstance(spec, PlanesConv2d):
        return test_bitserial_conv2d.operands(spec, batch, rng, (0,))
    shape = (batch, spec.in_features)
    planes = getattr(spec, "planes", None)
    zeros = (rng.random(shape) < 0.1) & spec.zeros
    data = [epilogue.pack((rng.random(shape) < 0.5) & ~zeros) for _ in (planes.data if planes else (1,))]
    mask = [epilogue.pack(zeros)] if spec.zeros else []
    if planes:
        weights = random_planes.weight_planes(rng, planes, (spec.out_features, spec.in_features))
        return [*data, weights, *mask, *random_planes.scales(rng, planes, spec.out_features)]
    return [*data, epilogue.pack(rng.random((spec.out_features, spec.in_features)) < 0.5), *mask]


def dims(spec, batch):
    """Leading and spatial dimensions of the result."""
    window = getattr(spec, "window", None)
    return (batch, window.out_height, window.out_width) if window else (batch,)


def channels(spec):
    """Output channels."""
    return getattr(spec, "out_channels", None) or spec.out_features


def run(spec, isa, plain, inputs, batch, schedule=None, **options):
    """The emulated kernel's outputs, which start as garbage."""
    family = families.of(spec, isa)
    schedule = schedule or family.default_schedule(spec, isa)
    count = len(spec.planes.data) if hasattr(spec, "planes") else 1
    arrays = list(plain)
    arrays[count] = family.pack_weights(spec, schedule, isa, arrays[count])
    outputs = [
        np.full(epilogue.output_shape(o, channels(spec), dims(spec, batch)), 77, epilogue.output_dtype(o)) for o in spec.epilogue.outputs
    ]
    emulate.run(family.build(spec, schedule, isa), [*arrays, *inputs, *outputs], **options)
    return outputs


def check(spec, isa, schedule=None, batch=2, seed=0, **options):
    """The kernel and the reference give equal results, bit for bit."""
    rng = np.random.default_rng(seed)
    plain = operands(spec, batch, rng)
    inputs = epilogue_inputs(rng, spec.epilogue, channels(spec), dims(spec, batch), spread=9)
    expected = families.of(spec, isa).reference(spec, plain, inputs)
    for number, (a, b) in enumerate(zip(run(spec, isa, plain, inputs, batch, schedule, **options), expected, strict=True)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=f"output {number} of {spec}, {schedule}")
