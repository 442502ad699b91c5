"""Products of two activations of bits, emulated, against numpy: every engine, kind of operand and way in which the right one lies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules.cuda import binary_matmul as family
from bnntvm.schedules.cuda import emulate
from tests.schedules.cuda.layers import LEVELS, NEWER
from tests.schedules.test_binary_matmul import KINDS, operand

QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ISAS = [LEVELS["sm_75"], LEVELS["sm_80"], LEVELS["sm_90a"]]


def arrays_of(spec, batch, rng):
    """Random operands as the kernel takes them; the bits that count are the first ones."""
    words, _ = operand(rng, spec.left, (batch, spec.rows, spec.features))
    others, _ = operand(rng, spec.right, (1 if spec.shared else batch, spec.columns, spec.features))
    missing = [(0, 0), (0, 0), (0, spec.words - -(-spec.features // 32))]
    words, others = ([np.pad(one, missing) for one in many] for many in (words, others))
    return [*words, *(one if spec.turned else np.ascontiguousarray(np.swapaxes(one, 1, 2)) for one in others)]


def check(spec, isa, schedule=None, batch=2, seed=0, **options):
    arrays = arrays_of(spec, batch, np.random.default_rng(seed))
    (expected,) = family.reference(spec, arrays)
    got = np.full(expected.shape, 77, expected.dtype)
    emulate.run(family.build(spec, schedule or family.default_schedule(spec, isa), isa), [*arrays, got], **options)
    np.testing.assert_array_equal(got, expected, err_msg=f"{spec}, {schedule}")


@settings(max_examples=40, **QUIET)
@given(data=st.data())
def test_on_cuda_cores(data):
    left, right = (data.draw(st.sampled_from(KINDS)) for _ in range(2))
    rows, columns, features = (data.draw(st.integers(1, most)) for most in (9, 37, 100))
    shared, scale, turned = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1.0, 0.3])), data.draw(st.booleans())
    words = -(-features // 32) + data.draw(st.integers(0, 1))
    spec = specs.BinaryMatmul(rows, columns, features, words, left, right, shared, scale, turned)
    check(spec, NEWER, data.draw(st.sampled_from(family.space(spec, NEWER))))


@settings(max_examples=60, **QUIET)
@given(data=st.data())
def test_on_tensor_cores(data):
    left, right = (data.draw(st.sampled_from(KINDS)) for _ in range(2))
    rows, columns = (data.draw(st.sampled_from([16, 33, 64, 100, 150])) for _ in range(2))
    features = data.draw(st.sampled_from([33, 64, 100, 256, 600, 1100]))
    shared, scale = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1.0, 0.3]))
    words = -(-features // 32) + data.draw(st.integers(0, 1))
    spec = specs.BinaryMatmul(rows, columns, features, words, left, right, shared, scale, True)
    isa, batch = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 3))
    found = [s for s in family.space(spec, isa) if s.engine == "mma"]
    if found:
        check(spec, isa, data.draw(st.sampled_from(found)), batch, seed=features)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_every_tile(isa):
    """All schedules of a product with borders in every direction; ternary ones count rows and columns."""
    spec = specs.BinaryMatmul(70, 90, 300, 10, "bipolar" if isa.operation == "xor" else "ternary", "unipolar", turned=True)
    found = [s for s in family.space(spec, isa) if s.engine == "mma"]
    assert len(found) > 5
    for schedule in found[:: len(found) // 8]:
        check(spec, isa, schedule)


def test_which_engine():
    """Tensor cores want columns as they are packed, something to do, and with xor factors that are even."""
    spec = specs.BinaryMatmul(197, 197, 64, 2)
    for isa in ISAS:
        assert family.takes_turned(spec, isa)
        assert family.default_schedule(spec, isa).engine == "cores"
        assert family.default_schedule(replace(spec, turned=True), isa).engine == "mma"
    assert not family.takes_turned(spec, NEWER)
    for small in (replace(spec, rows=4), replace(spec, columns=8), replace(spec, words=1, features=32)):
        assert not family.takes_turned(small, LEVELS["sm_80"])
    odd = replace(spec, left="unipolar", right="unipolar")
    assert not family.takes_turned(odd, LEVELS["sm_75"]) and family.takes_turned(odd, LEVELS["sm_80"])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("tokens, features", [(197, 64), (64, 512)])
def test_attention_by_default(isa, tokens, features):
    check(specs.BinaryMatmul(tokens, tokens, features, features // 32, scale=0.125, turned=True), isa, batch=3)
