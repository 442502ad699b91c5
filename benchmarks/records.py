"""Makes the tuning records that the package ships: ``bnntvm/records``.

::

    python -m benchmarks.records                                   # this processor's best level; hours
    python -m benchmarks.records --level x86-64-v3 --trials 2000   # another level that this processor runs
    python -m benchmarks.records --no-search                       # choose again from what was measured before

1. search: the zoo's kernels are tuned as ``bnntvm tune`` does, all networks into one database (``--database``; a later run goes on).
2. choose: every network runs with its default schedules and with the fastest candidates of its kernels in turns
   (:mod:`bnntvm.tuning.in_network`). A schedule is kept if it was faster by LEAST_GAIN in both halves of the turns, in every network.
3. networks: every network is built with default schedules and with the kept records, and both run in turns. The records of a network that
   is not faster are dropped, and the networks that used them are measured again, until no network with records is slower.
4. ship: what is left replaces the level's records in the package: for each kernel one record of the default and one of the winner.

A record names the processor that measured it. Records are found by what a kernel computes (:mod:`bnntvm.tuning.workload`), so they outlive
changes elsewhere. One whose schedule its family does not offer any more is passed over; run this again after such a change.

``--measure-with`` is put before the commands that measure, for example "chrt -f 50 taskset -c 1"; none of them runs for longer than about
a minute.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import bnntvm
from bnntvm.targets import x86
from bnntvm.tuning import in_network, records, tasks, worker
from bnntvm.tuning.measure import Local, Pipeline
from bnntvm.tuning.space import Space
from bnntvm.tuning.store import Store

from . import zoo

#: A schedule is kept if it is faster than the default by this factor.
LEAST_GAIN = 1.02
#: Schedules of a kernel that are compared with its default.
FINALISTS = in_network.STAY
#: A network with records is not slower if it takes no more than this of the time without: what is beyond is drift of the clock.
SLOWER = 1.002
#: Seconds that one measuring process may take before another goes on, and of one comparison of networks.
SLICE_SECONDS, NETWORK_SECONDS = 40.0, 4.0
SHIPPED = Path(bnntvm.__file__).parent / "records"


@dataclass
class Kernel:
    """A kernel of the zoo: its space, how often each network has it, and what was measured."""

    space: Space
    uses: dict = field(default_factory=dict)
    measured: dict = field(default_factory=dict)

    @property
    def finalists(self):
        """Schedules that may be faster than the default; all, where a change of the default has left it unmeasured."""
        default = self.measured.get(self.space.default)
        fastest = sorted((s for s in self.measured if s != self.space.default), key=self.measured.get)[:FINALISTS]
        if default == float("inf"):  # it does not run: nothing to compare with
            return []
        return [s for s in fastest if self.measured[s] < float("inf") and (default is None or self.measured[s] * LEAST_GAIN < default)]


@dataclass
class Winner:
    """A schedule that was faster than the default in every comparison, and the seconds of both in the last one."""

    kernel: Kernel
    schedule: object
    gain: float
    seconds: tuple


class Maker:
    """Makes records of one level.

    Parameters
    ----------
    level : bnntvm.targets.isa.Isa
    models : dict
        Network to the path of its ONNX file.
    database, folder : Path
        What was measured, and room for candidates.
    prefix : list of str
        Put before commands that measure.
    machine : str, optional
        What records name as their machine; default: this processor.
    """

    program, place = "benchmarks.records", "network"  # what measures networks; where the winners were compared

    def __init__(self, level, models, database, folder, prefix=(), machine=None):
        self.level, self.models, self.database, self.folder, self.prefix = level, models, database, folder, list(prefix)
        self.machine = machine
        self.kernels = self._kernels()

    def _kernels(self):
        found = {}
        for name, path in self.models.items():
            for task in tasks.extract(str(path), self.level):
                kernel = found.setdefault(task.id, Kernel(Space(task, 1, self.machine)))
                kernel.uses[name] = len(task.layers)
        return found

    def search(self, trials):
        """Tune every network; kernels that an earlier one has, too, are not measured again."""
        for path in self.models.values():
            bnntvm.tune(str(path), self.level, trials=trials, database=self.database)

    def look_up(self):
        """Fill in what the database knows of the kernels."""
        store = Store(self.database)
        for kernel in self.kernels.values():
            kernel.measured = store.measured(kernel.space)
        store.close()

    def choose(self):
        """The winners, by id of their kernel."""
        self.look_up()
        compared = collections.defaultdict(lambda: collections.defaultdict(list))
        for name in self.models:
            for task, times in self.within(name).items():
                default = self.kernels[task].space.default
                for schedule in times.keys() - {default}:
                    compared[task][schedule].append((times[default], times[schedule]))
        winners = {task: best_of(self.kernels[task], candidates) for task, candidates in compared.items()}
        return {task: winner for task, winner in winners.items() if winner}

    def within(self, name):
        """Task to schedule to seconds in every turn, of a network's kernels that may have faster schedules."""
        kernels = [k for k in self.kernels.values() if name in k.uses and k.finalists]
        pipeline = Pipeline(None, Local(1), threading.Event())
        try:
            network = pipeline.build_network(in_network.Network(str(self.models[name]), self.level, 1, {}))
            chosen = [(k.space, [k.space.default, *k.finalists]) for k in kernels]
            times = in_network.compare_schedules(network, pipeline, chosen)
        except (worker.Failure, bnntvm.BnnError) as error:
            print(f"{name}: {error}", flush=True)
            return {}
        finally:
            pipeline.close()
        print(f"{time.strftime('%H:%M:%S')} {name}: {len(kernels)} kernels may have faster schedules", flush=True)
        return times

    def measure(self, kind, jobs):
        """Results of jobs by their names, measured in processes of their own that take SLICE_SECONDS or a little more each."""
        results, left, attempts = {}, dict(jobs), 0
        while left and attempts < 3:
            order, answer = self.folder / "jobs.json", self.folder / "results.json"
            order.write_text(json.dumps(left))
            answer.unlink(missing_ok=True)
            command = [*self.prefix, sys.executable, "-m", self.program, "--measure", kind, str(order), str(answer)]
            subprocess.run(command, check=False, env=os.environ | {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
            new = json.loads(answer.read_text()) if answer.exists() else {}
            attempts = 0 if new else attempts + 1
            results |= {name: value for name, value in new.items() if value}
            left = {name: job for name, job in left.items() if name not in new}
            print(f"{time.strftime('%H:%M:%S')} {kind}: {len(results)} of {len(jobs)} measured", flush=True)
        return results

    def networks(self, winners):
        """Drop winners until no network is slower with what is left; returns {network: (ms without, ms with, ratio)} and the winners."""
        defaults, report, pending = {}, {}, set(self.models)
        while pending:
            draft = self.write(winners, self.folder / "draft")
            using = {n for w in winners.values() for n in w.kernel.uses} & pending
            jobs = {}
            for name in sorted(using):
                if name not in defaults:
                    defaults[name] = self._network(name, False, "default")
                jobs[name] = [defaults[name], self._network(name, str(draft), "tuned")]
            for name in pending - using:
                report.pop(name, None)
            found = self.measure("networks", jobs)
            report |= found
            for name, (before, after, ratio) in found.items():
                print(f"{name:20} {before * 1e3:8.3f} ms {after * 1e3:8.3f} ms {1 / ratio:7.3f}x", flush=True)
            slower = {name for name, (*_, ratio) in found.items() if ratio > SLOWER}
            dropped = {i for i, w in winners.items() if slower & set(w.kernel.uses)}
            pending = {n for i in dropped for n in winners[i].kernel.uses}
            winners = {i: w for i, w in winners.items() if i not in dropped}
            if dropped:
                print(f"{', '.join(sorted(slower))}: slower, {len(dropped)} records dropped", flush=True)
        return report, winners

    def _network(self, name, tuning, tag):
        path = self.folder / f"{name}.{tag}.bnn"
        bnntvm.build(str(self.models[name]), self.level, threads=1, tuning=tuning).export(path)
        return str(path)

    def write(self, winners, folder):
        """Records of the winners, in a folder of their own."""
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        store = Store(folder)
        for winner in winners.values():
            space = winner.kernel.space
            for schedule, seconds in zip((space.default, winner.schedule), winner.seconds):
                store.commit(space, schedule, seconds, place=self.place)
        store.close()
        return folder

    def ship(self, winners, target):
        """Replace the level's records in ``target``."""
        with tempfile.TemporaryDirectory() as folder:
            others = Path(folder, "others")
            sources = [self.write(winners, Path(folder, "own"))] if winners else []
            if (target / records.RECORDS).exists() and keep_other_levels(target, others, self.level.name):
                sources.insert(0, others)
            merged = Path(folder, "merged")
            records.merge(sources, merged)
            target.mkdir(exist_ok=True)
            for name in (records.WORKLOADS, records.RECORDS):
                (target / name).write_bytes((merged / name).read_bytes())


def best_of(kernel, candidates):
    """The :class:`Winner` among schedules, each with a list of (seconds of the default, its own) in turns; None if none is faster."""

    def least(compared):
        turns = [[b / a for b, a in zip(*one)] for one in compared]
        halves = [statistics.median(part) for ratios in turns for part in (ratios[::2], ratios[1::2]) if part]
        return min(halves + [statistics.median(default) / statistics.median(own) for default, own in compared])

    gains = {schedule: least(compared) for schedule, compared in candidates.items()}
    best = max(gains, key=gains.get, default=None)
    if best is None or gains[best] < LEAST_GAIN:
        return None
    return Winner(kernel, best, gains[best], candidates[best][-1])


def keep_other_levels(source, target, level):
    """Copy the records of levels other than ``level``; how many there are."""
    target.mkdir()
    kept = [json.dumps(r.line, separators=(",", ":")) + "\n" for r in records.read(source)[0] if r.isa != level]
    (target / records.RECORDS).write_text("".join(kept))
    (target / records.WORKLOADS).write_bytes((source / records.WORKLOADS).read_bytes())
    return len(kept)


# Measuring, in a process of its own -----------------------------------------------------------------------------------------------------


def measure_jobs(kind, order, answer, measures=None):
    """Work through jobs until the slice is over. ``measures``: name of a kind of job to its function."""
    import bnntvm.build  # noqa: F401  (before the first fork)
    from bnntvm.targets.tile_permission import tile_permission

    tile_permission()
    results, end = {}, time.monotonic() + SLICE_SECONDS
    for name, job in json.loads(Path(order).read_text()).items():
        try:
            results[name] = (measures or _MEASURES)[kind](job)
        except worker.Failure as failure:
            print(f"{name}: {failure}", flush=True)
            results[name] = None
        Path(answer).write_text(json.dumps(results))
        if time.monotonic() > end:
            break


def _measure_networks(paths):
    """(seconds of the first, seconds of the second, median of the ratios second to first) of two artefacts that run in turns."""
    modules = [bnntvm.load(path, threads=1) for path in paths]
    feed = modules[0].random_feed()
    once, rounds = collections.defaultdict(list), []
    for module in modules * 2:
        module.run(feed)
    start = time.perf_counter()
    modules[0].run(feed)
    count = max(1, int(0.015 / (time.perf_counter() - start)))
    end = time.monotonic() + NETWORK_SECONDS
    while time.monotonic() < end or len(rounds) < 9:
        order = (0, 1) if len(rounds) % 2 else (1, 0)
        for which in order:
            begin = time.process_time()
            for _ in range(count):
                modules[which].run(feed)
            once[which].append((time.process_time() - begin) / count)
        rounds.append(once[1][-1] / once[0][-1])
    return statistics.median(once[0]), statistics.median(once[1]), statistics.median(rounds)


_MEASURES = {"networks": _measure_networks}


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description=__doc__.splitlines()[0])
    parser.add_argument("--level", default=x86.host_level().name, help="instruction-set level (default: this processor's, %(default)s)")
    parser.add_argument("--networks", default=",".join(zoo.NAMES), help="comma-separated; default: all of the zoo")
    parser.add_argument("--trials", type=int, default=500, help="candidates of a network (default %(default)s)")
    parser.add_argument("--database", type=Path, default=Path("build/records"), help="what was measured (default %(default)s)")
    parser.add_argument("--no-search", action="store_true", help="choose from what the database has")
    parser.add_argument("--measure-with", default="", metavar="COMMAND", help="put before commands that measure")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="where records go (default: into the package)")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "JOBS", "RESULTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_jobs(*options.measure)
        return 0
    with tempfile.TemporaryDirectory(prefix="bnntvm-records-") as folder:
        models = {}
        for name in options.networks.split(","):
            models[name] = Path(folder, f"{name}.onnx")
            models[name].write_bytes(zoo.build(name).SerializeToString())
        prefix = shlex.split(options.measure_with)
        level = replace(x86.resolve(options.level), vendor=x86.resolve("x86").vendor)  # defaults may go by it, as those of users do
        maker = Maker(level, models, options.database / options.level, Path(folder), prefix)
        if not options.no_search:
            maker.search(options.trials)
        winners = maker.choose()
        print(f"{len(winners)} kernels have schedules that are faster by {LEAST_GAIN - 1:.0%} in all comparisons", flush=True)
        report, winners = maker.networks(winners)
        maker.ship(winners, options.output)
        for name, (before, after, ratio) in sorted(report.items()):
            print(f"{options.level} {name:20} {before * 1e3:8.3f} ms {after * 1e3:8.3f} ms {1 / ratio:7.3f}x")
        print(f"{len(winners)} records in {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
