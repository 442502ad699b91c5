"""Makes the tuning records of a GPU that the package ships.

::

    python -m benchmarks.cuda_records                                  # on a machine with the GPU and a CUDA compiler; hours
    python -m benchmarks.cuda_records --take PREPARED candidates.jsonl # anywhere, of what `benchmarks.cuda` has measured on one

As :mod:`benchmarks.records` for processors: search the zoo's kernels into one database, choose, see that no network is slower, ship. A
schedule is kept if it was faster than the default by LEAST_GAIN alone on the device, at every batch
(:mod:`bnntvm.tuning.gpu_program`). Networks then run in turns with and without the records, with one image and with several.

A device that is at hand for minutes should not wait for compilers: ``benchmarks.cuda_prepare --candidates N`` builds schedules elsewhere,
``benchmarks.cuda --only candidates`` measures them, ``--take`` makes records of that; networks are not compared then.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import tempfile
import threading
import time
from pathlib import Path

import bnntvm
from bnntvm.targets import registry
from bnntvm.tuning import worker
from bnntvm.tuning.measure import Pipeline
from bnntvm.tuning.space import Space
from bnntvm.tuning.store import Store

from . import zoo
from .records import LEAST_GAIN, SHIPPED, Kernel, Maker, best_of, measure_jobs

#: Images of the batches that networks run with, and seconds for each.
BATCHES, SECONDS = (1, 64), 3.0


class GpuMaker(Maker):
    """Makes records of this machine's GPU."""

    program, place = "benchmarks.cuda_records", "device"

    def choose(self):
        """The winners, by id of their kernel: compared once more, alone and in turns with the default."""
        from bnntvm.tuning.gpu import Gpu

        self.look_up()
        pipeline, winners = Pipeline(None, Gpu(self.level), threading.Event()), {}
        try:
            for task, kernel in self.kernels.items():
                times = compared(pipeline, kernel)
                winner = best_of(kernel, {s: [(times[kernel.space.default], t)] for s, t in times.items() if s != kernel.space.default})
                winners |= {task: winner} if winner else {}
        finally:
            pipeline.close()
        return winners


def compared(pipeline, kernel):
    """Schedule to seconds, of a kernel's default and finalists; empty where there is nothing to compare, or something failed."""
    if not kernel.finalists:
        return {}
    schedules = [kernel.space.default, *kernel.finalists]
    try:
        built = [one.result() for one in [pipeline.build(kernel.space, schedule) for schedule in schedules]]
        return dict(zip(schedules, pipeline.device.compare(built).result()))
    except worker.Failure as failure:
        print(f"{kernel.space.task.name}: {failure}", flush=True)
        return {}


def take(prepared, measured, database):
    """Put what was measured of prepared candidates into a database; the winners of their comparisons.

    Parameters
    ----------
    prepared : Path
        What :mod:`benchmarks.cuda_prepare` made.
    measured : Path
        ``candidates.jsonl`` of :mod:`benchmarks.cuda`.

    Returns
    -------
    dict
        Id of a kernel to :class:`.records.Winner`.
    """
    head, *lines = [json.loads(line) for line in measured.read_text().splitlines()]
    spaces, schedules, last = {}, {}, {}
    for name in dict.fromkeys(line["task"] for line in lines):
        task = pickle.loads((prepared / "candidates" / name / "task.pickle").read_bytes())
        spaces[name] = Space(task, 1, head["machine"])
        schedules[name] = pickle.loads((prepared / "candidates" / name / "schedules.pickle").read_bytes())
    store, place = Store(database), f"device {time.time_ns():016x}"
    for line in lines:
        name, schedule = line["task"], schedules[line["task"]][line["number"]]
        store.commit(spaces[name], schedule, line["seconds"], line.get("failed"), place if line.get("compared") else "")
        if line.get("compared"):
            last.setdefault(name, {})[schedule] = line["seconds"]
    store.close()
    winners = {}
    for name, times in last.items():
        default = times.pop(spaces[name].default)  # whose line comes first
        winners[name] = best_of(Kernel(spaces[name]), {schedule: [(default, seconds)] for schedule, seconds in times.items()})
    return {name: winner for name, winner in winners.items() if winner}


def _measure_networks(paths):
    """(seconds of one image of the first, of the second, ratio second to first) of two artefacts in turns, at the batch where the second
    is slowest in comparison."""
    modules, found = [bnntvm.load(path) for path in paths], []
    for batch in BATCHES:
        feed = modules[0].random_feed(batch=batch)
        feed = {name: _Lent(array) for name, array in feed.items()}
        taken = ([], [])
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or len(taken[0]) < 9:
            for which in (0, 1) if len(taken[0]) % 2 else (1, 0):
                taken[which].append(_run(modules[which], feed, max(3, 64 // batch)))
        before, after = map(statistics.median, taken)
        found.append((before / batch, after / batch, statistics.median(b / a for a, b in zip(*taken))))
    return max(found, key=lambda one: one[2])


def _run(module, feed, count):
    """Seconds of a run, ``count`` of which are started one after the other."""
    module.run(feed, check_finite=False)
    module.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        module.run(feed, check_finite=False)
    module.synchronize()
    return (time.perf_counter() - begin) / count


class _Lent:
    """An array in the device's memory, as another library would hand it over."""

    def __init__(self, array):
        from bnntvm.cuda.device import Device

        self.tensor, self.shape, self.dtype = Device().upload(array), array.shape, str(array.dtype)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        return self.tensor.__dlpack__()


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_records", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cuda", help="architecture (default: this machine's GPU)")
    parser.add_argument("--networks", default=",".join(zoo.NAMES), help="comma-separated; default: all of the zoo")
    parser.add_argument("--trials", type=int, default=500, help="candidates of a network (default %(default)s)")
    parser.add_argument("--database", type=Path, default=Path("build/records"), help="what was measured (default %(default)s)")
    parser.add_argument("--no-search", action="store_true", help="choose from what the database has")
    parser.add_argument("--take", nargs=2, type=Path, metavar=("PREPARED", "MEASURED"), help="make records of prepared candidates")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="where records go (default: into the package)")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "JOBS", "RESULTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_jobs(*options.measure, {"networks": _measure_networks})
        return 0
    with tempfile.TemporaryDirectory(prefix="bnntvm-records-") as folder:
        level = registry.resolve(options.target)
        if options.take:
            level = registry.resolve(json.loads((options.take[0] / "prepared.json").read_text())["target"])
        database = options.database / level.name
        if options.take:
            maker = GpuMaker(level, {}, database, Path(folder))
            winners = take(*options.take, database)
        else:
            maker, winners = _made(level, options, database, Path(folder))
        maker.ship(winners, options.output)
        print(f"{len(winners)} records in {options.output}")
    return 0


def _made(level, options, database, folder):
    """The maker, and winners with which no network is slower."""
    from bnntvm.cuda import driver

    models = {name: folder / f"{name}.onnx" for name in options.networks.split(",")}
    for name, path in models.items():
        path.write_bytes(zoo.build(name).SerializeToString())
    maker = GpuMaker(level, models, database, folder, machine=driver.load().name(0))
    if not options.no_search:
        maker.search(options.trials)
    winners = maker.choose()
    print(f"{len(winners)} kernels have schedules that are faster by {LEAST_GAIN - 1:.0%} at every batch", flush=True)
    report, winners = maker.networks(winners)
    for name, (before, after, ratio) in sorted(report.items()):
        print(f"{level.name} {name:20} {before * 1e3:8.3f} ms {after * 1e3:8.3f} ms {1 / ratio:7.3f}x")
    return maker, winners


if __name__ == "__main__":
    raise SystemExit(main())
