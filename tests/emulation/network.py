"""Runs a whole network kernel by kernel under emulation; TVM has no run time for 32-bit ARM, and this needs none.

It also tells how many instructions each kernel executes.
"""

from bnntvm.build import legalise, tvm_target
from tests.walk import Walk

from .emulator import Program


class Network(Walk):
    """A network compiled for another machine; parameters as of :class:`tests.walk.Walk`.

    Attributes
    ----------
    counts : dict of str to list
        After a run with ``count``: kernel -> for each of its calls the blocks it executes, see ``Program.blocks``.
    """

    def __init__(self, model, target):
        super().__init__(model, target)
        self.program, self.counts = Program(self.kernels, self.isa) if self.kernels else None, None

    def legalised(self, mod):
        with tvm_target(self.isa):
            return legalise(mod)

    def run(self, feed, count=False):
        """Outputs by name."""
        self.counts = {} if count else None
        return super().run(feed)

    def call(self, name, arrays, outputs):
        if self.counts is not None:
            known = self.counts.setdefault(name, [])  # a kernel does the same work every time
            known.append(known[0] if known else self.program.blocks([*arrays, *outputs], name))
        return self.program.run([*arrays, *outputs], name=name)[len(arrays) :]
