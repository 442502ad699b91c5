"""Kernels that move or make words of bits, emulated, against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules.cuda import bit_pad, bit_pool, emulate, pack, planar_pack
from tests.schedules.cuda.layers import NEWER
from tests.schedules.kernels import epilogue_inputs
from tests.schedules.test_bit_pool import windows
from tests.schedules.test_planar_pack import SIGN, TWO_PLANES

GARBAGE = 0xDEADBEEF


def compare(family, spec, arrays, expected, schedule=None, isa=NEWER):
    """The emulated kernel leaves what is expected."""
    schedule = schedule or family.default_schedule(spec, isa)
    outputs = [np.full(e.shape, 77, e.dtype) for e in expected]
    emulate.run(family.build(spec, schedule, isa), [*arrays, *outputs])
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=str(spec))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(window=windows(), channels=st.integers(1, 130), op=st.sampled_from(["and", "or"]), seed=st.integers(0, 99))
def test_pool(window, channels, op, seed):
    rng, spec = np.random.default_rng(seed), specs.BitPool(window, channels, op)
    data = tail.pack(rng.random((1 + seed % 2, window.in_height, window.in_width, channels)) < rng.choice([0.2, 0.8]))
    compare(bit_pool, spec, [data], bit_pool.reference(spec, [data]))


def test_unknown_pool():
    with pytest.raises(ValueError, match="xor"):
        bit_pool.build(specs.BitPool(specs.Window(2, 2, (2, 2)), 8, "xor"), bit_pool.Schedule(128), NEWER)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_pad(data):
    spec = specs.BitPad(
        data.draw(st.tuples(st.integers(1, 9), st.integers(1, 20))), data.draw(st.integers(1, 5)),
        data.draw(st.tuples(*[st.integers(0, 3)] * 4)), data.draw(st.sampled_from([0, 0xFFFFFFFF])),
    )  # fmt: skip
    words = np.random.default_rng(0).integers(0, 2**32, (2, *spec.spatial, spec.words), dtype=np.uint32)
    compare(bit_pad, spec, [words], bit_pad.reference(spec, [words]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    spatial=st.tuples(st.integers(1, 12), st.integers(1, 12)), channels=st.integers(1, 100), epilogue=st.sampled_from([SIGN, TWO_PLANES]),
    number=st.integers(0, 99),
)  # fmt: skip
def test_planar_pack(spatial, channels, epilogue, number):
    spec, rng = specs.PlanarPack(spatial, channels, epilogue), np.random.default_rng(number)
    data = rng.standard_normal((1 + number % 2, channels, *spatial)).astype(np.float32)
    inputs = epilogue_inputs(rng, epilogue, channels, (1 + number % 2, *spatial))
    space = planar_pack.space(spec, NEWER)
    compare(planar_pack, spec, [data, *inputs], planar_pack.reference(spec, [data], inputs), space[number % len(space)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    spatial=st.tuples(st.integers(1, 5), st.integers(1, 5)), channels=st.integers(1, 200) | st.sampled_from([32, 64, 256]),
    epilogue=st.sampled_from([SIGN, TWO_PLANES]),
    dtype=st.sampled_from(["float32", "float16"]), number=st.integers(0, 99),
)  # fmt: skip
def test_pack(spatial, channels, epilogue, dtype, number):
    rng, batch = np.random.default_rng(number), 1 + number % 3
    spec = specs.Map(4 if number % 2 else 2, spatial if number % 2 else (1, 1), channels, dtype, epilogue)
    dims = (batch, *spatial) if number % 2 else (batch,)
    data = rng.standard_normal((*dims, channels)).astype(dtype)
    inputs = epilogue_inputs(rng, epilogue, channels, dims)
    assert pack.claims(spec)
    space = pack.space(spec, NEWER)
    compare(pack, spec, [data, *inputs], pack.reference(spec, [data], inputs), space[number % len(space)])
