"""Measures this project beside its peers and writes a table, the raw numbers and a plot.

Every system runs in a process of its own, all pinned to the same core, one at a time and in turn: a round measures every system once.
Reported are the median over the rounds and half the distance between the quartiles; ratios are medians of the rounds' ratios. Times are
CPU time (wall time in the rows about threads), so a busy machine disturbs all systems alike.

* **single layers**: float in, float out, packing and unpacking included. The ONNX Runtime rows are given the bare layer and an input that
  is +-1 already: they do not pay for the sign.
* **packed chain**: what one more layer (threshold and re-pack included) adds to a chain of layers whose activations stay packed; the
  difference of a long and a short chain. The limit is a register-resident xor+popcount+add kernel, measured in the same rounds; MACs
  are nominal, padded taps counted, so a kernel that skips padded taps can pass 100 %.
* **networks**: the zoo at one image. The limit of all kernels is the sum of what `bnntvm profile` finds for each: the longer of its
  multiply-accumulates at the rate of a loop that does nothing else, and of its bytes at the rate at which memory of that size is read.
* **bits**: convolutions of two-bit activations and of ternary weights, beside ONNX Runtime in 8 bits and the same layer on one bit each.
* **weights**: dense layers of one row whose weights stay packed, beside ONNX Runtime in float32 and with weights of 2 bits, and beside the
  time that reading the weights takes.
* **threads**: one thread and two.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import report, zoo
from .attention import LAYERS as ATTENTION
from .attention import Attention
from .few_bits import LAYERS as FEW_BITS
from .few_bits import FewBits
from .layers import LAYERS, Layer
from .packed_weights import LAYERS as PACKED
from .packed_weights import PackedLayer
from .peers import SYSTEMS
from .worker import Worker, WorkerError

RESULTS = Path(__file__).parent / "results"


@dataclass
class Cell:
    """One system in one row.

    Attributes
    ----------
    seconds : list of float
        One figure for each round.
    note : str
        Remarks of the system.
    failure : str
        Why there is no figure; else empty.
    difference : float or None
        Largest distance to ONNX Runtime's output, as a part of its largest magnitude.
    prepare_seconds : float
        How long building took.
    macs : int
        Multiply-accumulates that the figure is for, where it is not the row's.
    limit_seconds : float
        What the figure would be if every kernel were at the machine's limit; 0 where that is not known.
    """

    seconds: list[float] = field(default_factory=list)
    note: str = ""
    failure: str = ""
    difference: float | None = None
    prepare_seconds: float = 0.0
    macs: int = 0
    limit_seconds: float = 0.0

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float:
        """Distance between the quartiles."""
        if len(self.seconds) < 2:
            return 0.0
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low)


@dataclass
class Row:
    """One line of a table.

    Attributes
    ----------
    kind : str
        ``layer``, ``chain``, ``network``, ``bits``, ``weights`` or ``threads``.
    name : str
        Layer or network.
    macs : int
        Binary multiply-accumulates.
    cells : dict
        By system; in a ``threads`` row by "system/threads".
    """

    kind: str
    name: str
    macs: int
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A model and its input, and which part of the result it is.

    Attributes
    ----------
    model : bytes
        Serialised ONNX; empty for the limit kernel.
    feed : dict
        Arrays by input name.
    weight : float
        The row's figure is the sum of weight * time over a system's jobs.
    """

    model: bytes
    feed: dict[str, np.ndarray]
    weight: float = 1.0


class Bench:
    """Runs rows.

    Parameters
    ----------
    systems : list of str
        Keys of `peers.SYSTEMS`.
    cores : list of int
        The first is used for one thread, the first two for two.
    rounds : int
        How often every system is measured.
    sample_seconds : float
        Length of one measurement.
    """

    def __init__(self, systems: list[str], cores: list[int], rounds: int, sample_seconds: float, progress: Progress):
        self.systems, self.cores, self.rounds, self.sample_seconds = systems, cores, rounds, sample_seconds
        self.progress = progress
        self._workers: dict[tuple[str, int], Worker] = {}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def measure(self, row: Row, plan: dict[str, tuple[str, int, list[Job]]]) -> Row:
        """Measure a row.

        Parameters
        ----------
        row : Row
            To be filled.
        plan : dict
            Cell name to (system, threads, jobs).
        """
        task = self.progress.add_task(f"{row.kind}: {row.name}", total=len(plan) + self.rounds)
        ready = {}
        for name, (system, threads, jobs) in plan.items():
            self.progress.update(task, description=f"{row.kind}: {row.name} [dim]prepare {name}[/]")
            row.cells[name] = Cell()
            ready[name] = self._prepare(row.cells[name], system, threads, jobs)
            self.progress.advance(task)
        self._compare(row, ready)
        self.progress.update(task, description=f"{row.kind}: {row.name}")
        for _ in range(self.rounds):
            for name, (system, threads, jobs) in plan.items():
                if ready[name] is not None:
                    self._sample(row.cells[name], self._worker(system, threads), jobs, ready[name][1], wall=row.kind == "threads")
            self.progress.advance(task)
        for worker in self._workers.values():
            worker.forget()
        self.progress.remove_task(task)
        return row

    def _worker(self, system: str, threads: int) -> Worker:
        if (system, threads) not in self._workers:
            self._workers[system, threads] = Worker(system, self.cores[:threads])
        return self._workers[system, threads]

    def _prepare(self, cell: Cell, system: str, threads: int, jobs: list[Job]):
        """Prepare all jobs of a cell; (outputs of the last job, repeats of each job), or None with the failure noted."""
        worker, repeats = self._worker(system, threads), []
        try:
            for i, job in enumerate(jobs):
                answer = worker.prepare(str(i), job.model, job.feed)
                cell.prepare_seconds += answer.seconds
                cell.limit_seconds += answer.limit_seconds * job.weight
                wall, _ = worker.measure(str(i), 1)
                repeats.append(max(1, min(2000, round(self.sample_seconds / max(wall, 1e-7)))))
            cell.note, cell.macs = answer.note, answer.macs
            return answer.outputs, repeats
        except WorkerError as error:
            cell.failure = str(error)
            return None

    @staticmethod
    def _sample(cell: Cell, worker: Worker, jobs: list[Job], repeats: list[int], wall: bool) -> None:
        """One figure more, or the failure."""
        if cell.failure:
            return
        try:
            times = [worker.measure(str(i), r)[0 if wall else 1] for i, r in enumerate(repeats)]
            cell.seconds.append(sum(t * j.weight for t, j in zip(times, jobs)))
        except WorkerError as error:
            cell.failure, cell.seconds = str(error), []

    @staticmethod
    def _compare(row: Row, ready: dict) -> None:
        """Note how far every output is from ONNX Runtime's in float32."""
        reference = next((r[0][0] for n, r in ready.items() if r and n.split("/")[0] == "ort"), None)
        if reference is None:
            return
        for name, answer in ready.items():
            if answer and answer[0]:
                row.cells[name].difference = float(np.abs(answer[0][0] - reference).max() / np.abs(reference).max())

    # -- what is measured ---------------------------------------------------------------------------------------------------------------

    def layer(self, layer: Layer) -> Row:
        binary = Job(layer.binary().SerializeToString(), {"input": layer.input()})
        plain = Job(layer.plain().SerializeToString(), {"input": layer.input(binary=True)})
        plan = {s: (s, 1, [plain if s.startswith("ort") else binary]) for s in self.systems if s != "limit"}
        return self.measure(Row("layer", layer.name, layer.macs), plan)

    def chain(self, layer: Layer) -> Row:
        # The longer the chain, the smaller the noise; dense layers carry 64 MB of float weights each.
        short, long = 2, 8 if layer.size else 5
        weight = 1 / (long - short)
        feed = {"input": layer.input()}
        jobs = [Job(layer.chain(n).SerializeToString(), feed, w) for n, w in ((short, -weight), (long, weight))]
        plan = {s: (s, 1, jobs) for s in self.systems if s in ("bnntvm", "default", "openvino")}
        if "limit" in self.systems:
            plan["limit"] = ("limit", 1, [Job(b"", {})])
        return self.measure(Row("chain", layer.name, layer.macs), plan)

    def few_bits(self, layer: FewBits) -> Row:
        short, long = 1, 5
        weight = 1 / (long - short)
        plan = {}
        if "bnntvm" in self.systems:
            plan["bnntvm"] = ("bnntvm", 1, [Job(layer.chain(1).SerializeToString(), {"input": layer.input()})])
            for name, chained in (("bnntvm/chain", layer), ("bnntvm/binary", layer.binary)):
                feed = {"input": chained.input()}
                jobs = [Job(chained.chain(n).SerializeToString(), feed, w) for n, w in ((short, -weight), (long, weight))]
                plan[name] = ("bnntvm", 1, jobs)
        if "ort" in self.systems:
            plan["ort"] = ("ort", 1, [Job(layer.chain(1).SerializeToString(), {"input": layer.input()})])
        if "ort-u8s8" in self.systems:
            plan["ort-u8s8"] = ("ort-u8s8", 1, [Job(layer.plain().SerializeToString(), {"input": layer.input(quantised=True)})])
        row = self.measure(Row("bits", layer.name, layer.macs), plan)
        for name in ("bnntvm/chain", "bnntvm/binary"):  # other networks than ONNX Runtime's
            if name in row.cells:
                row.cells[name].difference = None
        return row

    def weights(self, layer: PackedLayer) -> Row:
        feed = {"input": layer.input()}
        jobs = {s: Job(layer.model().SerializeToString(), feed) for s in ("bnntvm", "ort") if s in self.systems}
        if layer.bits == 2 and "ort" in self.systems:
            jobs["ort-2bit"] = Job(layer.two_bits().SerializeToString(), feed)
        jobs["stream"] = Job(b"", {"bytes": np.ones(layer.packed_bytes, np.uint8)})
        return self.measure(Row("weights", layer.name, layer.macs), {s: (s, 1, [job]) for s, job in jobs.items()})

    def attention(self, layer: Attention) -> Row:
        jobs = {"bnntvm": Job(layer.model().SerializeToString(), layer.feed())}
        jobs["ort"] = Job(layer.model(signs=False).SerializeToString(), layer.feed(signs=True))
        return self.measure(Row("attention", layer.name, layer.macs), {s: (s, 1, [job]) for s, job in jobs.items() if s in self.systems})

    def network(self, name: str, model: onnx.ModelProto, threads: list[int] | None = None) -> Row:
        job = Job(model.SerializeToString(), {model.graph.input[0].name: network_input(model)})
        macs = zoo.size_of(model).binary_macs
        systems = [s for s in self.systems if s != "limit"]
        if threads is None:
            plan = {s: (s, 1, [job]) for s in systems}
            if "limit" in self.systems:
                plan["limit"] = ("limit", 1, [Job(b"", {})])
            return self.measure(Row("network", name, macs), plan)
        plan = {f"{s}/{n}": (s, n, [job]) for s in systems if s not in ("ort-u8s8", "default") for n in threads}
        return self.measure(Row("threads", name, macs), plan)


def network_input(model: onnx.ModelProto) -> np.ndarray:
    """One random image for a network; unknown dimensions, the batch among them, are 1."""
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(11).standard_normal(shape).astype(np.float32)


def environment(cores: list[int]) -> dict:
    """Where and with what the numbers were taken."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line) if info.exists() else {}
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    versions = {}
    for package in sorted({s.package for s in SYSTEMS.values()}):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "host": socket.gethostname(),
        "cpu": fields.get("model name", platform.processor()),
        "cpu family/model/stepping": "/".join(fields.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "cores used": cores,
        "cores of the host": os.cpu_count(),
        "load at start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.run --networks quicknet,birealnet18 --quick",
    )
    parser.add_argument("--networks", default=None, help=f"comma-separated, or none; default all: {', '.join(zoo.NAMES)}")
    parser.add_argument("--model", type=Path, action="append", default=[], help="an ONNX file of your own with one input; repeatable")
    parser.add_argument("--layers", action="store_true", help="single layers and packed chains (default: everything, unless one is chosen)")
    parser.add_argument("--bits", action="store_true", help="convolutions of few-bit activations and weights, binary attention")
    parser.add_argument("--weights", action="store_true", help="dense layers whose weights stay packed")
    parser.add_argument("--threads", action="store_true", help="the two-thread row")
    parser.add_argument("--only", default=None, help="layers to measure: comma-separated parts of their names, such as 14x14x256")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="few short rounds: minutes less, noise more")
    parser.add_argument("--rounds", type=int, default=None, help="how often every system is measured (default 21, quick 5)")
    parser.add_argument("--core", type=int, default=None, help="processor to use (default: the last one allowed)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results.md, results.json and results.png")
    options = parser.parse_args(arguments)
    options.systems = [s for s in options.systems.split(",") if s]
    unknown = [s for s in options.systems if s not in SYSTEMS]
    everything = options.networks is None and not (options.layers or options.bits or options.weights or options.threads or options.model)
    for part in ("layers", "bits", "weights", "threads"):
        setattr(options, part, getattr(options, part) or everything)
    names = options.networks.split(",") if options.networks else list(zoo.NAMES) if everything else []
    options.networks = [n for n in names if n != "none"]
    unknown += [n for n in options.networks if n not in zoo.NAMES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def choose_cores(core: int | None) -> list[int]:
    """The core to measure on first, then the others this process may use."""
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    if core is None:
        return allowed
    return [core, *[c for c in sorted(range(os.cpu_count()), reverse=True) if c != core]]


def measure_all(bench: Bench, options: argparse.Namespace, save) -> list[Row]:
    """All rows that were asked for; ``save(rows)`` is called after each, so that an interrupted run leaves what it has."""
    rows: list[Row] = []
    parts = options.only.split(",") if options.only else [""]
    layers = [x for x in LAYERS if options.layers and any(p in x.name for p in parts)]
    for measure in (bench.layer, bench.chain):
        for layer in layers:
            rows.append(measure(layer))
            save(rows)
    for layer in FEW_BITS if options.bits else ():
        if any(p in layer.name for p in parts):
            rows.append(bench.few_bits(layer))
            save(rows)
    for layer in ATTENTION if options.bits else ():
        if any(p in layer.name for p in parts):
            rows.append(bench.attention(layer))
            save(rows)
    for layer in PACKED if options.weights else ():
        if any(p in layer.name for p in parts):
            rows.append(bench.weights(layer))
            save(rows)
    for name in options.networks:
        rows.append(bench.network(name, zoo.build(name)))
        save(rows)
    for path in options.model:
        rows.append(bench.network(path.stem, onnx.load(path)))
        save(rows)
    if options.threads and len(bench.cores) > 1:
        rows.append(bench.network("quicknet_large", zoo.build("quicknet_large"), threads=[1, 2]))
        save(rows)
    return rows


def main(arguments: list[str]) -> int:
    """Measure, write, print the tables."""
    options = parse(arguments)
    cores = choose_cores(options.core)
    console = Console()
    rounds = options.rounds or (5 if options.quick else 21)
    facts = environment(cores[:2]) | {"rounds": rounds}

    def save(rows: list[Row]) -> None:
        content = {"environment": facts, "rows": [asdict(r) for r in rows]}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(content, indent=1))
        (options.out / "results.md").write_text(report.markdown(content))

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bench = Bench(options.systems, cores, rounds, 0.01 if options.quick else 0.02, progress)
        try:
            rows = measure_all(bench, options, save)
        finally:
            bench.close()
    if not rows:
        console.print("nothing to measure")
        return 1
    print((options.out / "results.md").read_text())
    try:
        report.plot(json.loads((options.out / "results.json").read_text()), options.out / "results.png")
    except ImportError as error:
        console.print(f"no plot: {error}")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
