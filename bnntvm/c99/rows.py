"""Two steps as one that keeps only the rows of the tensor between them that a window still reads.

A convolution whose one reader is a pool or another convolution needs no memory for its whole result: its rows are computed when the
reader's window reaches them and take the place of rows that it has left, row y in slot ``y % rows``. That is worth it where the tensor is
part of what makes the workspace large, and is done only there.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnntvm import spec as sp

from .plan import bound
from .program import Buffer, Step

#: Steps whose rows can be computed one by one, and steps whose window can read them.
PRODUCERS = (sp.BinaryConv2d, sp.PlanesConv2d, sp.FloatConv2d, sp.Pool2d)
CONSUMERS = (sp.BinaryConv2d, sp.FloatConv2d, sp.Pool2d)


@dataclass(frozen=True)
class Rows:
    """``producer`` and ``consumer`` are specifications; ``output`` of the producer is the consumer's data, of which ``rows`` are kept."""

    producer: object
    consumer: object
    output: int
    rows: int

    @property
    def reach(self):
        """Rows that a window of the consumer spans."""
        window = self.consumer.window
        return window.dilations[0] * (window.kernel[0] - 1) + 1


def join(steps):
    """Join pairs of steps for as long as the most bytes that live at once become fewer; the steps that remain."""
    best = bound(steps)
    while True:
        trials = [joined(steps, a, b) for a, b in candidates(steps)]
        sizes = [bound(trial) for trial in trials]
        if not sizes or min(sizes) >= best:
            return steps
        best = min(sizes)
        steps = trials[sizes.index(best)]


def candidates(steps):
    """Pairs (producer, consumer) of steps that may be joined."""
    for b, reader in enumerate(steps):
        if not isinstance(reader.what, CONSUMERS) or getattr(reader.what, "planar", False) or getattr(reader.what, "zeros", False):
            continue
        data = reader.reads[0]
        readers = [s for s in steps for r in s.reads if r is data]
        a = next((i for i in range(b) if data in steps[i].writes and isinstance(steps[i].what, PRODUCERS)), None)
        if a is None or len(readers) != 1 or data.role != "workspace":
            continue
        outputs = steps[a].what.epilogue.outputs
        stored = outputs[steps[a].writes.index(data)].kind != "planar"
        early = any(w in s.reads for s in steps[a + 1 : b] for w in steps[a].writes)
        if stored and not early and _rows(reader.what) < data.shape[1]:
            yield a, b


def _rows(spec):
    return spec.window.dilations[0] * (spec.window.kernel[0] - 1) + 1


def joined(steps, a, b):
    """``steps`` with step ``a`` moved into step ``b``."""
    producer, consumer = steps[a], steps[b]
    data = consumer.reads[0]
    kept = Buffer((_rows(consumer.what), *data.shape[2:]), data.dtype)
    what = Rows(producer.what, consumer.what, producer.writes.index(data), kept.shape[0])
    one = Step(
        what, [*producer.reads, *consumer.reads[1:]], [*(w for w in producer.writes if w is not data), *consumer.writes],
        f"{producer.origin}, {consumer.origin}", [kept],
    )  # fmt: skip
    return [one if i == b else s for i, s in enumerate(steps) if i != a]
