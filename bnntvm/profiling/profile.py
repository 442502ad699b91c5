"""``bnntvm.profile``: the time of every call of a network, beside what the machine could do in it."""

from __future__ import annotations

import functools
import json
import pathlib
import shlex
import subprocess
import tempfile
from dataclasses import asdict, dataclass

import numpy as np

from bnntvm.artefact import check_machine
from bnntvm.errors import BnnError, ToolchainError, UnsupportedError
from bnntvm.profiling.measure import noted
from bnntvm.report import LOW_BIT, Layer
from bnntvm.spec import split_layers

#: Seconds to measure for.
SECONDS = 1.0
_HEADS = ("layer", "kernel", "kind", "time", "share", "MACs/s", "bytes", "bytes/s", "limit", "of it", "bound by")
_RIGHT = {3, 4, 5, 6, 7, 8, 9}


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes
    ----------
    kernel : str
    layer : str
        First output of the ONNX node that it computes, with what was fused to it; empty for what belongs to no layer (packing, pools, ...).
    node, kind : str
        Of the layer, see :class:`bnntvm.Layer`; empty without one.
    start_us, time_us : float
        When it began in a run of median length, and the median of its times.
    macs : int
        Multiply-accumulates; those of a layer that takes several calls are shared out evenly.
    bytes : int
        What it reads and writes, each tensor once.
    limit_us : float
        The time that the machine's limit allows: the longer of its computation at the measured rate of such operations and of its bytes at
        the rate at which the machine reads an array of that size again and again (between those measured: interpolated).
    bound : str
        The limit: ``bits``, ``int8``, ``float`` or ``memory``.
    """

    kernel: str
    layer: str
    node: str
    kind: str
    start_us: float
    time_us: float
    macs: int
    bytes: int
    limit_us: float
    bound: str


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` measured; ``print`` shows it.

    Attributes
    ----------
    calls : tuple of Call
        In the order of the run.
    whole_us : float
        Median time of a run without the probe.
    limits : dict
        ``bits``, ``int8``, ``float``: multiply-accumulates per second; ``read``: list of (bytes, bytes per second).
    target : str
    threads, batch, runs : int
    place : str
    """

    calls: tuple
    whole_us: float
    limits: dict
    target: str
    threads: int
    batch: int
    runs: int
    place: str

    @property
    def sum_us(self):
        """Sum of the calls."""
        return sum(call.time_us for call in self.calls)

    def as_dict(self):
        """Plain data, for JSON."""
        return asdict(self) | {"calls": [asdict(c) | {"percent_of_limit": _percent(c)} for c in self.calls], "sum_us": self.sum_us}

    def chrome_trace(self):
        """Events for chrome://tracing or Perfetto."""
        events = [
            {"name": c.node or c.kernel, "cat": c.kind or "other", "ph": "X", "pid": 0, "tid": 0, "ts": c.start_us, "dur": c.time_us,
             "args": asdict(c) | {"percent_of_limit": _percent(c)}}
            for c in self.calls
        ]  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ns"}

    def __str__(self):
        rows = [_HEADS, *(self._cells(call) for call in self.calls)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
        lines = ["  ".join(c.rjust(w) if i in _RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        rest = self.whole_us - self.sum_us
        lines += [
            "", f"{self.sum_us:.1f} us in kernels, {self.whole_us:.1f} us a run: {rest:+.1f} us ({rest / self.whole_us:+.1%}) beside them; "
            f"median of {self.runs} runs, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"target {self.target}, {self.place}",
            "limits measured there: " + ", ".join(f"{name} {_si(self.limits[name])}MAC/s" for name in ("bits", "int8", "float"))
            + ", read " + ", ".join(f"{_si(rate)}B/s of {_si(size)}B" for size, rate in self.limits["read"]),
        ]  # fmt: skip
        return "\n".join(lines)

    def _cells(self, call):
        name = call.node if len(call.node) <= 36 else "..." + call.node[-33:]
        seconds = call.time_us / 1e6
        return (
            name, call.kernel, call.kind, f"{call.time_us:.1f} us", f"{call.time_us / self.sum_us:.1%}",
            _si(call.macs / seconds) if call.macs else "", _si(call.bytes), _si(call.bytes / seconds), f"{call.limit_us:.1f} us",
            f"{_percent(call):.0f} %", call.bound,
        )  # fmt: skip

    def roofline(self, path):
        """Write a picture: multiply-accumulates per second over those per byte, under the measured roofs.

        Parameters
        ----------
        path : path
            .svg, .png or .pdf.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BnnError("a picture needs matplotlib", hint="pip install 'bnntvm[plot]'") from error
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        layers = [c for c in self.calls if c.macs and c.bytes]
        places = [c.macs / c.bytes for c in layers] or [1.0]
        left, right = min(places) / 4, max(max(places) * 4, 2 * max(self.limits[k] for k in ("bits", "int8")) / self.limits["read"][-1][1])
        for name in ("bits", "int8", "float"):
            axes.plot([left, right], [self.limits[name]] * 2, linewidth=1, color="black")
            axes.annotate(f"{name}: {_si(self.limits[name])}MAC/s", (right, self.limits[name]), ha="right", va="bottom", fontsize=8)
        top = max(self.limits[name] for name in ("bits", "int8", "float"))
        reads = self.limits["read"]
        for size, rate in (reads[0], reads[len(reads) // 2], reads[-1]):
            axes.plot([left, min(right, top / rate)], [left * rate, min(right * rate, top)], linewidth=0.8, linestyle="--", color="gray")
            axes.annotate(f"{_si(size)}B: {_si(rate)}B/s", (left, left * rate), fontsize=7, color="gray", va="bottom")
        for kind in dict.fromkeys(c.kind for c in layers):
            mine = [c for c in layers if c.kind == kind]
            areas = [20 + 400 * c.time_us / self.sum_us for c in mine]
            axes.scatter([c.macs / c.bytes for c in mine], [c.macs / c.time_us * 1e6 for c in mine], s=areas, label=kind, alpha=0.6)
        axes.set(xscale="log", yscale="log", xlabel="multiply-accumulates per byte moved", ylabel="multiply-accumulates per second",
                 title=f"{self.target}, {self.threads} thread{'s' * (self.threads > 1)}; areas: share of the time")  # fmt: skip
        if layers:
            axes.legend(fontsize=8, loc="lower right")
        try:
            figure.savefig(pathlib.Path(path))
        except (OSError, ValueError) as error:
            hint = "give a path of .svg or .png"
            raise BnnError("the picture could not be written", where=str(path), why=str(error), hint=hint) from error


def profile(module, board=None, *, batch=1, seconds=SECONDS):
    """Measure where a network's time goes.

    Parameters
    ----------
    module : Module
    board : bnntvm.remote.client.Board, optional
        Where to run it; default: here.
    batch : int
        Size of dynamic dimensions.
    seconds : float
        How long to measure, about; the machine's limits take another second.

    Returns
    -------
    Profile

    Raises
    ------
    BnnError
        TargetError where the machine cannot run it, ToolchainError where nothing compiles the probe, UnsupportedError for an artefact
        that tells too little.
    """
    manifest = module._manifest
    if "calls" not in manifest:
        raise UnsupportedError("the artefact does not tell which call computes which layer", why="an older bnntvm built it",
                               hint="build it again")  # fmt: skip
    if manifest["target"].get("machine") == "cuda":
        raise UnsupportedError("networks for GPUs are not profiled kernel by kernel", why="their kernels run beside the host's code",
                               hint="NVIDIA's ncu and nsys show each kernel by its name in the report")  # fmt: skip
    from bnntvm.targets import registry

    if board is None:  # before anything is compiled
        check_machine(module._file, manifest, f"target {module.report.target}")
    isa = registry.resolve(manifest["target"]["name"])
    limits, library = _probe(isa)
    plan = {"batch": batch, "threads": board.threads if board else module.threads, "seconds": seconds, "limits": limits}
    with tempfile.TemporaryDirectory(prefix="bnntvm-") as folder:
        artefact, probe = pathlib.Path(folder, "network.bnn"), pathlib.Path(folder, "probe.so")
        module.export(artefact)
        probe.write_bytes(library)
        if board is None:
            from bnntvm.profiling.measure import measure

            measured = measure(json.dumps(plan | {"artefact": str(artefact), "probe": str(probe)}))
        else:
            measured = board.measure(plan, artefact, probe)
    return _profile(json.loads(measured), manifest, isa, batch, board.name if board else "this machine")


@functools.cache
def _probe(isa):
    """(how to call the limits, shared library with them and with probe.c) for an instruction-set level."""
    import tvm

    from bnntvm.build import tvm_target
    from bnntvm.profiling.limits import kernels

    functions, limits = kernels(isa)
    compiled = tvm.compile(tvm.IRModule(functions), target=tvm_target(isa))
    with tempfile.TemporaryDirectory(prefix="bnntvm-") as folder:
        path = pathlib.Path(folder, "probe.so")
        compiled.export_library(str(path), fcompile=lambda out, objects, **_: _link_probe(isa, out, objects))
        return limits, path.read_bytes()


def probe_library(isa):
    """Shared library of probe.c alone."""
    with tempfile.TemporaryDirectory(prefix="bnntvm-") as folder:
        path = pathlib.Path(folder, "probe.so")
        _link_probe(isa, path, [])
        return path.read_bytes()


def _link_probe(isa, out, objects):
    import tvm_ffi

    from bnntvm.linker import compiler_for

    source, include = pathlib.Path(__file__).with_name("probe.c"), pathlib.Path(tvm_ffi.__file__).with_name("include")
    compiler, objects = compiler_for(isa), [objects] if isinstance(objects, str) else objects
    command = [*shlex.split(compiler), "-O2", "-shared", "-fPIC", "-s", f"-I{include}", "-x", "c", str(source), "-x", "none", *objects]
    done = subprocess.run([*command, "-o", str(out), "-lm"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ToolchainError("the probe could not be compiled", where=compiler, why=done.stderr.strip()[-500:])


def _profile(measured, manifest, isa, batch, place):
    """Rows from what was measured: every kernel's call stands in the manifest, in this order."""
    known, layers = manifest["calls"], {entry["output"]: Layer.from_dict(entry) for entry in manifest["layers"]}
    kernels = [noted(call["kernel"]) for call in known]
    times = [call for call in measured["calls"] if call[0] in kernels]
    if [name for name, _, _ in times] != kernels:
        hint = "this is a gap in bnntvm: please report it with the model"
        raise BnnError("the calls of the run are not those of the artefact", hint=hint)
    limits = measured["limits"]
    limits.setdefault("int8", limits["bits"] * isa.int8_macs / isa.bit_macs)
    uses = [call["layer"] for call in known]
    calls = []
    for call, (_, start, ns) in zip(known, times):
        names = split_layers(call["layer"] or "")
        own = [layers[name] for name in names if name in layers]
        layer, macs = own[0] if own else None, sum(one.macs for one in own) * batch // max(1, uses.count(call["layer"]))
        size = call["bytes"] + batch * call["bytes_per_image"]
        seconds, bound = _limit(layer, macs, size, limits)
        nodes = " + ".join(one.node or one.output for one in own)
        calls.append(Call(call["kernel"], " + ".join(names), nodes, layer.kind if layer else "",
                          start / 1e3, ns / 1e3, macs, size, seconds * 1e6, bound))  # fmt: skip
    return Profile(tuple(calls), measured["whole_ns"] / 1e3, limits, isa.name, measured["threads"], batch, measured["runs"], place)


def _limit(layer, macs, size, limits):
    """(seconds, what bounds it) of a call at the machine's limit."""
    sizes, rates = zip(*limits["read"])
    found = [(size / float(np.interp(np.log(max(1, size)), np.log(sizes), rates)), "memory")]
    if layer and macs and layer.kind in LOW_BIT - {"weight-only"}:
        ways = [(macs / limits["int8"], "int8")] if limits["int8"] else []
        # A mask of zeros beside the signs counts as a plane there, but is multiplied only where a zero occurs.
        pairs = 1 if layer.kind == "binary" else _pairs(layer.planes)
        if pairs:
            ways.append((macs * pairs / limits["bits"], "bits"))
        found.append(min(ways))
    elif macs:
        found.append((macs / limits["float"], "float"))
    return max(found)


def _pairs(planes):
    """Pairs of planes of "2x1"; 0 where it says something else."""
    left, _, right = planes.partition("x")
    return int(left) * int(right) if left.isdigit() and right.isdigit() else 0


def _percent(call):
    return 100 * call.limit_us / call.time_us if call.time_us else 0.0


def _si(value):
    """A number with three digits and a prefix, to be followed by a unit."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
