"""Float and 8-bit kernels for GPUs, run by the emulator, against their references.

Data and weights are small integers stored as float32: every sum is exact in any order, so results are compared bit by bit.
"""

import numpy as np

from bnntvm.schedules import epilogue as epilogues
from bnntvm.schedules.cuda import emulate
from bnntvm.targets import registry
from tests.schedules.float_kernels import EPILOGUES, epilogue_inputs, epilogue_names, geometries, small_integers

ISA = registry.resolve("sm_80")

__all__ = ["EPILOGUES", "ISA", "check", "epilogue_names", "execute", "geometries", "small_integers"]


def execute(kernel, arrays, outputs):
    """Run a kernel; ``outputs`` are (shape, dtype), and start as garbage, so that an element that is not stored shows."""
    made = [np.full(shape, 77, dtype) for shape, dtype in outputs]
    emulate.run(kernel, [*(np.ascontiguousarray(a) for a in arrays), *made])
    return made


def check(family, spec, data, weights, channels, dims, rng, schedule=None, inputs=None, isa=ISA):
    """Run the kernel that ``family`` builds for ``spec`` and compare every output with the reference, bit by bit.

    ``weights`` is what ``pack_weights`` takes, or None; further operands behind the weights are in ``data`` behind a None.
    """
    schedule = schedule or family.default_schedule(spec, isa)
    inputs = epilogue_inputs(rng, spec.epilogue, channels, dims) if inputs is None else inputs
    at = next((i for i, one in enumerate(data) if one is None), len(data))
    before, after = data[:at], data[at + 1 :]
    plain = [*before, *([] if weights is None else [weights]), *after]
    packed = [*before, *([] if weights is None else [family.pack_weights(spec, schedule, isa, weights)]), *after]
    outputs = [(epilogues.output_shape(o, channels, dims), epilogues.output_dtype(o)) for o in spec.epilogue.outputs]
    got = execute(family.build(spec, schedule, isa), [*packed, *inputs], outputs)
    for actual, expected in zip(got, family.reference(spec, plain, inputs), strict=True):
        np.testing.assert_array_equal(actual, expected, err_msg=f"{spec} {schedule}")
