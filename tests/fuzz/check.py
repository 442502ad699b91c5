"""Compare a random network with ONNX Runtime, bit for bit, and make a failing one small."""

from __future__ import annotations

import pathlib
import traceback
from dataclasses import dataclass

import numpy as np

import bnntvm.interpreter.packed  # noqa: F401  (teaches the interpreter the packed operators)
from bnntvm.importer import import_model
from bnntvm.interpreter import run
from bnntvm.pipeline import passes
from tests.fuzz.networks import generate
from tests.importer.helpers import reference
from tests.schedules.machines import LEVELS


@dataclass(frozen=True)
class Failure:
    """Why a network failed: a short kind (the same for the same bug) and the details."""

    kind: str
    detail: str = ""

    def __str__(self):
        return f"{self.kind}: {self.detail}"


def differences(got, wanted):
    """A description of the first output that differs, or None. -0.0 equals 0.0."""
    if len(got) != len(wanted):
        return f"{len(got)} outputs instead of {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
        if not np.array_equal(a, b):
            where = np.argwhere(a != b)
            first = tuple(map(int, where[0]))
            return f"output {i}: {len(where)} of {a.size} elements differ, first at {list(first)}: {a[first]} instead of {b[first]}"
    return None


def raised(stage, error):
    """A Failure from an exception: its cause, and where that happened."""
    cause = error.__cause__ or error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if "site-packages" not in f.filename and f.filename.endswith(".py")]
    place = f"{pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return Failure(f"{stage} raised {type(cause).__name__} in {frames[-1].name}", f"{place}: {str(cause).strip()[:300]}")


def interpreted(network):
    """Importer, every pass, numpy interpreter against ONNX Runtime. None or a Failure that names the pass."""
    wanted = reference(network.reference, network.feed)
    stage = "import"
    try:
        mod = import_model(network.model).mod
        stages, decisions = [("import", mod)], {}
        for one in passes(decisions):
            stage = type(one).__name__
            mod = one(mod)
            stages.append((stage, mod))
        stage = "interpreter"
        if differences(run(mod, network.feed), wanted):
            for stage, mod in stages:
                wrong = differences(run(mod, network.feed), wanted)
                if wrong:
                    return Failure(f"wrong after {stage}", wrong)
    except Exception as error:  # noqa: BLE001  (whatever goes wrong is the finding)
        return raised(stage, error)
    return unpacked(network, {name: (d.kind, d.reason) for name, d in decisions.items()})


def unpacked(network, kinds):
    """A Failure if a layer that had to be computed on bits was not; ``kinds``: output of the layer -> (kind, reason)."""
    for layer in sorted(network.binary):
        kind, reason = kinds.get(layer, ("float", "no decision"))
        if kind != "binary" and "always zero" not in reason:
            return Failure("stayed float", f"{layer}: {reason}")
    for layer in sorted(network.low):
        kind, reason = kinds.get(layer, ("float", "no decision"))
        if kind not in ("binary", "bitserial", "int8") and "always zero" not in reason:
            return Failure("low-bit layer", f"{layer} is {kind}: {reason}")
    for layer in sorted(network.packed):
        kind, reason = kinds.get(layer, ("float", "no decision"))
        if kind == "float" and "always zero" not in reason:
            return Failure("weights not packed", f"{layer}: {reason}")
    return None


def target_of(seed):
    """Half of the seeds are compiled for this machine, the others for each of the levels that it can run."""
    names = [isa.name for isa in LEVELS]
    return "x86" if seed % 2 else names[seed // 2 % len(names)]


def compiled(network):
    """``bnntvm.build`` and ``run`` against ONNX Runtime."""
    import bnntvm

    wanted = reference(network.reference, network.feed)
    stage = "build"
    try:
        module = bnntvm.build(network.model, target_of(network.seed), threads=1 + network.seed % 3 // 2)
        stage = "run"
        got = list(module.run(network.feed).values())
    except Exception as error:  # noqa: BLE001
        return raised(stage, error)
    wrong = differences(got, wanted)
    if wrong:
        return Failure("wrong result", f"{wrong} ({target_of(network.seed)})")
    return unpacked(network, {layer.output: (layer.kind, layer.reason) for layer in module.report.layers})


def emulated(network):
    """The kernels as compiled for ARM, run under emulation, against ONNX Runtime."""
    from tests.emulation.network import Network

    wanted, target = reference(network.reference, network.feed), ("armv7", "aarch64", "aarch64-i8mm")[network.seed % 3]
    try:
        got = list(Network(network.model, target).run(network.feed).values())
    except Exception as error:  # noqa: BLE001
        return raised(f"emulation of {target}", error)
    wrong = differences(got, wanted)
    return Failure("wrong result", f"{wrong} ({target})") if wrong else None


CHECKS = {"interpreter": interpreted, "build": compiled, "emulate": emulated}


def minimise(seed, check, kind):
    """The smallest set of layers of ``seed`` found, by dropping one at a time, that still fails in the same way."""
    layers, shrinking = list(generate(seed).layers), True
    while shrinking:
        shrinking = False
        for i in range(len(layers) - 1, -1, -1):
            fewer = layers[:i] + layers[i + 1 :]
            failure = check(generate(seed, fewer))
            if failure is not None and failure.kind == kind:
                layers, shrinking = fewer, True
    return layers
