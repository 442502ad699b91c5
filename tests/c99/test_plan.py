"""The workspace: nothing that lives at the same time overlaps, and the plan is as small as the bound."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as sp
from bnntvm.c99.plan import Tensor, arrange, live_bytes, plan
from bnntvm.c99.program import Buffer, Step

TENSORS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 12), st.integers(0, 4)).map(lambda t: Tensor(4 * t[0], t[1], t[1] + t[2])), max_size=14
)


@settings(max_examples=150, deadline=None)
@given(TENSORS)
def test_no_overlap(tensors):
    offsets, total = arrange(tensors, attempts=50)
    for (a, i), (b, j) in itertools.combinations(zip(tensors, offsets), 2):
        if a.first <= b.last and b.first <= a.last:
            assert i + a.bytes <= j or j + b.bytes <= i
    assert total == max((t.bytes + o for t, o in zip(tensors, offsets)), default=0)
    assert total >= max(live_bytes(tensors, 20))


def test_chains_reach_the_bound():
    """A chain of layers with shortcuts over two of them: what networks look like."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tensors = [Tensor(int(rng.integers(1, 100)) * 4, i, i + int(rng.choice([1, 1, 2, 3]))) for i in range(40)]
        assert arrange(tensors)[1] == max(live_bytes(tensors, 50))


def addition():
    """y = x + e: an elementwise step that may write its result over either operand."""
    return sp.Map(2, (1, 1), 8, "float32", sp.Epilogue((sp.EpilogueInput("tensor"),), (sp.Step("add", (0, 1)),), (sp.Output("tensor", 2),)))


def test_in_place():
    """A sum takes the place of an operand that dies there, not of one that is read later."""
    a, b, c, d, out = (Buffer((4, 8), "float32") for _ in range(5))
    out.role = "output"
    steps = [Step("make", [], [a]), Step("make", [], [b]), Step(addition(), [a, b], [c]), Step(addition(), [c, a], [d])]
    steps.append(Step("end", [d], [out]))
    made = plan(steps)
    assert made.offsets[c] == made.offsets[b] != made.offsets[a]
    assert made.offsets[d] in (made.offsets[a], made.offsets[c])
    assert made.bytes == made.live == 2 * a.bytes


def test_not_in_place():
    """An operand that is read at other elements as well keeps its memory: a tensor added to itself by way of two operands."""
    a, c, out = (Buffer((4, 8), "float32") for _ in range(3))
    out.role = "output"
    made = plan([Step("make", [], [a]), Step(addition(), [a, a], [c]), Step("end", [c], [out])])
    assert made.offsets[a] != made.offsets[c]
