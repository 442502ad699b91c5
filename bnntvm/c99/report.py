"""What an exported network takes: flash, RAM, and the map of the workspace."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field

import numpy as np

FLAGS = ["-std=c99", "-Os", "-ffp-contract=off", "-ffunction-sections", "-c"]
#: Compilers that tell how large the code is: command, options.
COMPILERS = (("arm-none-eabi-gcc", ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")), ("cc", ()), ("gcc", ()))


@dataclass
class Report:
    """Sizes in bytes.

    Attributes
    ----------
    weights, workspace, inputs, outputs : int
        Constants (flash), the workspace (RAM), the caller's tensors (RAM).
    code : int or None
        Machine code of the network's C file, where a compiler was found: ``compiler``.
    lower_bound, at : int
        The most bytes of tensors that live at one step, and its number: no plan needs less.
    tensors : list of dict
        Of the workspace: offset, bytes, first and last step.
    steps : list of str
    """

    weights: int
    workspace: int
    inputs: int
    outputs: int
    lower_bound: int
    at: int
    code: int | None = None
    compiler: str = ""
    tensors: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    @property
    def flash(self):
        """Constants and code; constants alone where the code was not measured."""
        return self.weights + (self.code or 0)

    @property
    def ram(self):
        """The workspace; inputs and outputs are the caller's."""
        return self.workspace

    def json(self):
        """Everything as text."""
        return json.dumps(asdict(self) | {"flash": self.flash, "ram": self.ram}, indent=1) + "\n"

    def __str__(self):
        code = f"{self.code:>12,}  {self.compiler}" if self.code is not None else f"{'?':>12}  (no compiler found: make size)"
        step = f", step {self.at} {self.steps[self.at]}" if self.steps and self.tensors else ""
        lines = [
            "bytes",
            f"flash  weights   {self.weights:>12,}",
            f"       code      {code}",
            f"       total     {self.flash:>12,}",
            f"RAM    workspace {self.workspace:>12,}  (most that live at once: {self.lower_bound:,}{step})",
            f"caller's inputs  {self.inputs:>12,}",
            f"       outputs   {self.outputs:>12,}",
            "",
            "workspace: offset, bytes, first and last step",
            *(f"{t['offset']:>10} {t['bytes']:>10}  {t['first']:>4} {t['last']:>4}  {self.steps[t['first']]}" for t in self.tensors),
        ]
        return "\n".join(lines)

    def summary(self):
        """The table without the map."""
        return str(self).split("\n\nworkspace:")[0]


def measure(source, steps, folder):
    """The report of a network that was written to ``folder``."""
    lives = {}
    for at, step in enumerate(steps):
        for buffer in (*step.reads, *step.writes, *step.scratch):
            if buffer in source.plan.offsets:
                lives.setdefault(buffer, [at, at])[1] = at
    tensors = [
        dict(offset=source.plan.offsets[b], bytes=b.bytes, dtype=b.dtype, shape=list(b.shape), first=first, last=last)
        for b, (first, last) in lives.items()
    ]
    code, compiler = code_bytes(source, folder)
    return Report(
        sum(np.asarray(data).nbytes for _, data in source.constants), source.plan.bytes, sum(t.bytes for t in source.inputs),
        sum(t.bytes for t in source.outputs), source.plan.live, source.plan.where, code, compiler, tensors, source.calls,
    )  # fmt: skip


def code_bytes(source, folder):
    """(bytes of the code of ``NAME.c``, command that says so), or (None, "")."""
    for command, options in COMPILERS:
        size = shutil.which(command.replace("gcc", "size") if command != "cc" else "size")
        if not shutil.which(command) or not size:
            continue
        with tempfile.TemporaryDirectory(prefix="bnntvm-") as scratch:
            made = pathlib.Path(scratch, "network.o")
            arguments = [command, *options, *FLAGS, str(pathlib.Path(folder, f"{source.name}.c")), "-o", str(made)]
            if subprocess.run(arguments, capture_output=True).returncode:
                continue
            done = subprocess.run([size, str(made)], capture_output=True, text=True)
        if done.returncode == 0:
            return int(done.stdout.splitlines()[1].split()[0]), " ".join([command, *options[:1], "-Os"])
    return None, ""
