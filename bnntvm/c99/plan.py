"""Where every tensor lies in the one workspace.

A tensor lives from the step that writes it to the last one that reads it. No plan can need less than the most bytes that live at one step;
:func:`plan` tries to need no more: tensors are placed one by one, each at the lowest offset that no tensor alive at the same time covers,
first in the order of their sizes, then in others until that bound is reached.

A result may take the place of an operand that dies there, if a kernel reads and writes them element by element: such tensors are one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from bnntvm import spec as sp

#: Orders that are tried beyond the first.
ATTEMPTS = 2000


@dataclass(frozen=True)
class Tensor:
    """What is placed: bytes (a multiple of the alignment) and the first and last step of its life."""

    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes by buffer, bytes in all, and the most bytes that live at one step (``live``, at step ``where``)."""

    offsets: dict
    bytes: int
    live: int
    where: int


def plan(steps):
    """Place the workspace buffers of ``steps`` (:class:`.program.Step`)."""
    groups, tensors = _tensors(steps)
    offsets, total = arrange(list(tensors.values()))
    where = {b: offsets[i] for i, b in enumerate(tensors)}
    live = live_bytes(tensors.values(), len(steps))
    peak = max(live, default=0)
    return Plan({b: where[g] for b, g in groups.items() if g in where}, total, peak, live.index(peak) if live else 0)


def bound(steps):
    """The most bytes that live at one step."""
    _, tensors = _tensors(steps)
    return max(live_bytes(tensors.values(), len(steps)), default=0)


def _tensors(steps):
    """Buffer -> the one whose memory it shares; the latter -> :class:`Tensor`."""
    groups, lives = _joined(steps), {}
    for at, step in enumerate(steps):
        for buffer in (*step.reads, *step.writes, *step.scratch):
            if buffer.role == "workspace":
                first, _ = lives.get(groups[buffer], (at, at))
                lives[groups[buffer]] = first, at
    alignment = max([4, *(_alignment(b) for b in lives)])
    return groups, {b: Tensor(-(-b.bytes // alignment) * alignment, *life) for b, life in lives.items()}


def _alignment(buffer):
    return 8 if buffer.dtype in ("float64", "int64", "uint64") else 4


def live_bytes(tensors, steps):
    """Bytes that live at each step."""
    return [sum(t.bytes for t in tensors if t.first <= at <= t.last) for at in range(steps)]


def arrange(tensors, attempts=ATTEMPTS):
    """Offsets of tensors and the bytes they take.

    Returns
    -------
    (list of int, int)
    """
    bound = max(live_bytes(tensors, max((t.last for t in tensors), default=-1) + 1), default=0)
    order = sorted(range(len(tensors)), key=lambda i: (-tensors[i].bytes, tensors[i].first - tensors[i].last, i))
    best = _place(tensors, order)
    others = [sorted(order, key=lambda i: tensors[i].first), sorted(order, key=lambda i: tensors[i].first - tensors[i].last)]
    rng = random.Random(0)
    for attempt in range(attempts):
        if best[1] == bound:
            break
        trial = others[attempt] if attempt < len(others) else _exchanged(order, rng)
        made = _place(tensors, trial)
        if made[1] <= best[1]:
            best, order = made, trial
    return best


def _exchanged(order, rng):
    """``order`` with one element moved."""
    order = list(order)
    order.insert(rng.randrange(len(order)), order.pop(rng.randrange(len(order))))
    return order


def _place(tensors, order):
    """Place tensors in an order, each at the lowest offset that is free while it lives."""
    offsets, placed, total = [0] * len(tensors), [], 0
    for i in order:
        one, at = tensors[i], 0
        for j in sorted(placed, key=offsets.__getitem__):
            other = tensors[j]
            if other.first <= one.last and one.first <= other.last:
                if offsets[j] - at >= one.bytes:
                    break
                at = max(at, offsets[j] + other.bytes)
        offsets[i] = at
        placed.append(i)
        total = max(total, at + one.bytes)
    return offsets, total


def _joined(steps):
    """Buffer -> the buffer whose memory it shares: itself, or an operand that its kernel replaces element by element."""
    last, owner = {}, {}
    for at, step in enumerate(steps):
        for buffer in step.reads:
            last[buffer] = at
    alive = dict(last)  # memory -> last step that reads one of its buffers
    for at, step in enumerate(steps):
        for buffer in (*step.reads, *step.writes, *step.scratch):
            owner.setdefault(buffer, buffer)
        free = [b for b in _elementwise(step) if b.role == "workspace" and alive[owner[b]] == at and step.reads.count(b) == 1]
        for made, output in zip(step.writes, getattr(getattr(step.what, "epilogue", None), "outputs", ())):
            match = [b for b in free if (b.bytes, b.dtype) == (made.bytes, made.dtype)]
            if match and output.kind == "tensor" and made.role == "workspace":
                free.remove(match[0])
                owner[made] = owner[match[0]]
                alive[owner[made]] = last.get(made, at)
    return owner


def _elementwise(step):
    """Operands of a step that its kernel reads at the element it writes, and nowhere else."""
    epilogue = getattr(step.what, "epilogue", None)
    if epilogue is None:
        return []
    inputs = step.reads[len(step.reads) - len(epilogue.inputs) :]
    found = [b for b, e in zip(inputs, epilogue.inputs) if e.kind == "tensor" and e.times == 1]
    return found + (step.reads[:1] if isinstance(step.what, sp.Map) else [])
