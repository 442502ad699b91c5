"""A compiled network that runs: what ``bnntvm.build`` and ``bnntvm.load`` return."""

import difflib
import hashlib
import itertools
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bnntvm import artefact, runtime
from bnntvm.errors import ArtefactError, BnnError, InputError
from bnntvm.report import Report

#: Elements of a dot product that BLAS libraries do on one thread.
_DOT_LENGTH = 8192


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a network.

    Attributes
    ----------
    name : str
    shape : tuple of int or str or None
        A str names a dynamic dimension, equal names are equal sizes; None is a dynamic dimension without a name.
    dtype : str
        numpy's name of the element type.
    """

    name: str
    shape: tuple
    dtype: str

    def __str__(self):
        return f"{self.name}: {self.dtype}{_shape_text(self.shape)}"


@dataclass(frozen=True)
class Timing:
    """Result of :meth:`Module.benchmark`: times of single runs, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeat: int

    @classmethod
    def of(cls, times_ms):
        """The summary of a list of times."""
        p10, median, p90 = np.percentile(times_ms, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), len(times_ms))

    def __str__(self):
        return f"{self.median_ms:.3f} ms (10 % of runs below {self.p10_ms:.3f}, 90 % below {self.p90_ms:.3f}; {self.repeat} runs)"


class Module:
    """A compiled network.

    Made by ``bnntvm.build`` or ``bnntvm.load``. It may be run from several threads at once; each caller gets a virtual machine of its own,
    code and constants are shared.

    Parameters
    ----------
    file : binary file
        Shared library or artefact, open for reading.
    manifest : dict
        ``format``, ``bnntvm`` (version), ``target`` (``name``, ``needs``: CPU flags), ``inputs`` and ``outputs`` (lists of ``name``,
        ``shape``, ``dtype``), ``overridable`` (name -> ``shape``, ``dtype``, ``sha256`` of the C-order bytes), ``layers`` (see
        ``bnntvm.report.Layer``), ``constants_bytes``, ``code_bytes``, ``workspace_bytes``, ``options``.
    library_bytes : int, optional
        Length of the library where the file is an artefact.
    threads : int, optional
        Threads for one run; default ``BNNTVM_NUM_THREADS``, else one per core.

    Attributes
    ----------
    inputs, outputs : tuple of TensorInfo
    report : bnntvm.report.Report
    threads : int
    """

    def __init__(self, file, manifest, library_bytes=None, threads=None):
        self.threads = runtime.choose_threads(threads)
        self.inputs = _infos(manifest["inputs"])
        self.outputs = _infos(manifest["outputs"])
        self.report = Report.from_manifest(manifest)
        anywhere = manifest.get("unaligned_inputs", [False] * len(self.inputs))
        self._entries = [_Entry.of(info, bool(free)) for info, free in zip(self.inputs, anywhere, strict=True)]
        self._names = {info.name: None for info in self.inputs}.keys()
        self._known_shapes = {}
        self._again = None  # see _repeater
        fresh = manifest.get("fresh_outputs", [False] * len(self.outputs))
        self._exits = [(info, np.dtype(info.dtype), bool(own)) for info, own in zip(self.outputs, fresh, strict=True)]
        self._checked_inputs = [bool(v) for v in manifest.get("checked_inputs", [False] * len(self.inputs))]
        self._manifest = manifest
        self._overridable = manifest["overridable"]
        self._file, self._library_bytes = file, library_bytes
        self._library = None
        self._lock = threading.Lock()
        self._idle = []  # machines that no caller uses now; list.pop and list.append are atomic

    @classmethod
    def from_library(cls, path, manifest, threads=None):
        """A module from a shared library that was just built; the file may be deleted afterwards.

        The library is loaded by the first run: what was built for another machine can still be exported.
        """
        return _class_for(manifest, cls)(open(path, "rb"), manifest, threads=threads)  # noqa: SIM115  (kept: export copies from it)

    @classmethod
    def load(cls, path, threads=None):
        """See :func:`bnntvm.load`."""
        threads = runtime.choose_threads(threads)
        file, manifest, library_bytes = artefact.read(path)
        try:
            module = _class_for(manifest, cls)(file, manifest, library_bytes, threads)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            file.close()
            raise ArtefactError(
                "the artefact's manifest is malformed", where=str(path), why=_first_line(error), hint="build it again"
            ) from error
        module._idle.append(module._machine())
        return module

    def run(self, feed, check_finite=True):
        """Run the network.

        Parameters
        ----------
        feed : dict of str to array
            One entry per input. Any memory order and byte order; converted where the type is of the same kind and can hold every value.
        check_finite : bool
            Whether NaN and infinity in an input are an error.

        Returns
        -------
        dict of str to numpy.ndarray
            One new array per output.

        Raises
        ------
        InputError
            If a name, a shape, a type or a value is not what the network takes.
        """
        again = self._again
        outputs = again(feed, check_finite) if again is not None else None
        return self._run(feed, check_finite) if outputs is None else outputs

    def _repeater(self, arrays, single, names):
        """A function that does the same as :meth:`_run` for a feed like that of the last run, whose arrays went through as they are, and
        returns None for any other.

        A network may leave nothing of Python in the processor's caches, and then every function that is called costs microseconds.
        """
        inputs = [(info.name, array.dtype, array.shape) for info, array in zip(self.inputs, arrays)]
        count, shapes, threads, idle = len(inputs), tuple([array.shape for array in arrays]), self.threads, self._idle
        unchecked = tuple([i for i in range(count) if not self._checked_inputs[i]])
        ndarray, threads_in_force = np.ndarray, runtime.threads_in_force

        def again(feed, check_finite):
            if type(feed) is not dict or len(feed) != count or threads_in_force() != threads:
                return None
            arrays = []
            for name, dtype, shape in inputs:
                array = feed.get(name)
                if type(array) is not ndarray or array.dtype is not dtype or array.shape != shape or not array.flags.carray:
                    return None
                arrays.append(array)
            try:
                machine = idle.pop()
            except IndexError:
                return None
            try:
                results = machine.run_again(arrays, shapes, single, unchecked if check_finite else None)
            except Exception:  # noqa: BLE001  (_run meets it again, on another machine, and says what it is)
                return None
            idle.append(machine)
            return None if results is None else dict(zip(names, results))

        return again

    def _run(self, feed, check_finite):
        arrays, single = self._match(feed)
        machine = self._machine()
        try:
            staged = [self._stage(machine, i, arrays[i], check_finite) for i in range(len(arrays))]
        except InputError:
            self._idle.append(machine)
            raise
        except MemoryError as error:
            raise BnnError("not enough memory for the inputs", where=self._shapes_text(arrays), why=str(error),
                           hint="give a smaller batch") from error  # fmt: skip
        try:
            results = machine.run(staged, self.threads, single)
        except Exception as error:
            hint = "a smaller batch needs less memory" if "alloc" in str(error).lower() else None
            raise BnnError("the network failed while it ran", where=self._shapes_text(arrays), why=_first_line(error), hint=hint) from error
        self._idle.append(machine)
        outputs = {info.name: _as_declared(array, dtype, own) for (info, dtype, own), array in zip(self._exits, results)}
        plain = all(made is array for made, array in zip(outputs.values(), results)) and len(outputs) == len(results)
        if plain and all(entry.passes(a, s) for entry, a, s in zip(self._entries, arrays, staged)):
            self._again = self._repeater(arrays, single, list(outputs))
        return outputs

    def __call__(self, array, check_finite=True):
        """Run a network with one input; returns the array of its one output, or the dict of its outputs."""
        if len(self.inputs) != 1:
            raise InputError(
                f"the network has {len(self.inputs)} inputs, module(array) is for one",
                why="inputs: " + ", ".join(info.name for info in self.inputs),
                hint="module.run({name: array, ...})",
            )
        outputs = self.run({self.inputs[0].name: array}, check_finite)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def export(self, path):
        """Write the network to one ``.bnn`` file, atomically (see :mod:`bnntvm.artefact`)."""
        artefact.write(self._file, self._manifest, path, self._library_bytes)

    def benchmark(self, feed=None, repeat=None, warmup=5, against=None):
        """Time single runs.

        Parameters
        ----------
        feed : dict, optional
            As for :meth:`run`; default :meth:`random_feed`.
        repeat : int, optional
            Number of timed runs; default as many as fit into a second, at least 10.
        warmup : int
            Runs before the first that is timed.
        against : callable, optional
            Something to compare with: called without arguments, in short turns with this network, so that both meet the same machine.

        Returns
        -------
        Timing, or (Timing, Timing) with ``against``
        """
        if repeat is not None and repeat < 1:
            raise BnnError(f"not a number of runs: {repeat}", where="repeat=", hint="give an integer of 1 or more")
        feed = self.random_feed() if feed is None else feed
        calls = [lambda: self._finished(feed)] + ([against] if against else [])
        times = [[] for _ in calls]
        for call in calls * warmup:
            call()
        end = time.perf_counter() + len(calls)
        while min(map(len, times)) < (repeat or 10) or repeat is None and time.perf_counter() < end:
            for call, spent in zip(calls, times):
                if against:
                    _call_for(_SETTLE_S, call)
                spent += _call_for(_TURN_S, call, None if repeat is None else repeat - len(spent))
        timings = [Timing.of(spent) for spent in times]
        return tuple(timings) if against else timings[0]

    def _finished(self, feed):
        """A run that is over when this returns."""
        self.run(feed)

    def random_feed(self, seed=0, batch=1):
        """Inputs that fit: normal floats, small non-negative integers; every dynamic dimension is ``batch``."""
        rng = np.random.default_rng(seed)
        feed = {}
        for info in self.inputs:
            shape, dtype = [dim if isinstance(dim, int) else batch for dim in info.shape], np.dtype(info.dtype)
            try:
                values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
                feed[info.name] = values.astype(dtype)
            except (MemoryError, ValueError) as error:  # ValueError: beyond what an array can be
                raise BnnError(
                    "not enough memory for the inputs",
                    where=f"{info.name} {_shape_text(shape)}",
                    why=str(error),
                    hint="give a smaller batch",
                ) from error
        return feed

    def __repr__(self):
        ins, outs = (", ".join(map(str, infos)) for infos in (self.inputs, self.outputs))
        return f"<bnntvm.Module {ins} -> {outs}; target {self.report.target}, {self.threads} thread{'s' * (self.threads > 1)}>"

    def __reduce__(self):
        raise TypeError("a bnntvm.Module cannot be pickled; module.export(path) and bnntvm.load(path) in the other process")

    def _machine(self):
        """A virtual machine that no other caller uses; loads the library if nobody has."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._lock:
            if self._library is None:
                self._library = self._load_library()
        return self._library.machine()

    def _load_library(self):
        """The library, after a check that this machine can run it."""
        artefact.check_machine(self._file, self._manifest, f"target {self.report.target}")
        return open_library(self._file, lambda path: runtime.Library(path, self._manifest.get("direct")))

    def _shapes_text(self, arrays):
        return ", ".join(f"{info.name} {_shape_text(array.shape)}" for info, array in zip(self.inputs, arrays))

    def _match(self, feed):
        """The feed as arrays in the order of the inputs, of declared type and shape, and whether all dynamic dimensions are 1."""
        if not isinstance(feed, Mapping):
            raise InputError(
                f"run takes a dict of input name to array, not {type(feed).__name__}", hint="module(array) for a network with one input"
            )
        if feed.keys() != self._names:
            self._check_names(feed)
        arrays = [entry.array(feed[entry.info.name]) for entry in self._entries]
        shapes = tuple([array.shape for array in arrays])
        single = self._known_shapes.get(shapes)
        if single is None:
            single = self._check_shapes(shapes)
        return arrays, single

    def _check_shapes(self, shapes):
        """Whether all dynamic dimensions are 1; raises InputError for shapes that do not fit. Remembers those that do."""
        sizes = {}
        for shape, info in zip(shapes, self.inputs):
            _check_shape(shape, info, sizes)
        if len(self._known_shapes) >= _KNOWN_SHAPES:
            self._known_shapes.clear()
        single = self._known_shapes[shapes] = all(size == 1 for size, _ in sizes.values())
        return single

    def _check_names(self, feed):
        if len(feed) == len(self.inputs) and all(info.name in feed for info in self.inputs):
            return
        names = [info.name for info in self.inputs]
        missing = [name for name in names if name not in feed]
        extra = [name for name in feed if name not in names]
        unknown = [name for name in extra if name not in self._overridable]
        if missing or unknown:
            why = [f"missing: {', '.join(missing)}"] if missing else []
            why += [f"unknown: {', '.join(map(repr, unknown))}"] if unknown else []
            close = {near for name in unknown for near in difflib.get_close_matches(str(name), missing, 1)}
            raise InputError(
                "the feed does not have the network's inputs",
                where="inputs " + ", ".join(names),
                why="; ".join(why),
                hint=f"did you mean {', '.join(sorted(close))}?" if close else None,
            )
        for name in extra:
            _check_override(name, feed[name], self._overridable[name])

    def _stage(self, machine, index, array, check_finite):
        """Input ``index`` as the kernels take it: the array itself if it is that already, else a copy in the machine's buffer."""
        entry = self._entries[index]
        if not entry.lends(array):
            copy = machine.buffer(index, array.shape, entry.staged)
            np.copyto(copy, array)
            array = copy
        if check_finite and entry.floating and not (entry.single_precision and machine.is_finite(array)):
            _check_finite(array, entry.info.name)
        return array


@dataclass(frozen=True, slots=True)
class _Entry:
    """What :meth:`Module.run` needs to know of an input, looked up once.

    Attributes
    ----------
    info : TensorInfo
    dtype, staged : numpy.dtype
        The declared type and that of the kernels: float16 becomes float32.
    anywhere : bool
        Whether the kernels read it at any address that suits its elements; else at multiples of 64 bytes, which numpy does not promise.
    floating, single_precision : bool
        Of the kernels' type.
    """

    info: TensorInfo
    dtype: np.dtype
    staged: np.dtype
    anywhere: bool
    floating: bool
    single_precision: bool

    @classmethod
    def of(cls, info, anywhere):
        dtype = np.dtype(info.dtype)
        staged = np.dtype(np.float32) if dtype == np.float16 else dtype
        return cls(info, dtype, staged, anywhere, staged.kind == "f", staged == np.float32)

    def array(self, value):
        """``value`` as an array of the declared type, in any byte order."""
        return value if type(value) is np.ndarray and value.dtype is self.dtype else _convert(value, self.info)

    def lends(self, array):
        """Whether the kernels can read ``array`` itself. (A read-only array cannot be lent.)"""
        if array.dtype != self.staged or not array.flags.carray:
            return False
        return self.anywhere or array.ctypes.data % runtime.ALIGNMENT == 0

    def passes(self, array, staged):
        """Whether ``array`` went to the kernels as it is, and would wherever it lay."""
        return array is staged and self.anywhere and self.single_precision


#: Shapes of inputs that a module remembers to have checked.
_KNOWN_SHAPES = 64


#: Turns of two sides that are compared, and calls before each that do not count. Threads of the other side that still spin, waiting for
#: work, hold the cores for a while.
_TURN_S, _SETTLE_S = 0.05, 0.01


def _call_for(seconds, call, most=None):
    """Milliseconds of each of the calls that begin within ``seconds``, at least one, but not more than ``most``."""
    times, end = [], time.perf_counter() + seconds
    while (not times or time.perf_counter() < end) and (most is None or len(times) < most):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def load(path, threads=None):
    """Load an artefact: no ONNX file, no compilation, no compiler library.

    **An artefact is native code. Load only files whose maker you trust**; the checksum finds damage, not malice.

    Parameters
    ----------
    path : str or pathlib.Path
    threads : int, optional
        Threads for one run; default ``BNNTVM_NUM_THREADS``, else one per core.

    Returns
    -------
    Module

    Raises
    ------
    ArtefactError
        If the file is missing, damaged, or not an artefact of this format.
    TargetError
        If this machine cannot run it.
    """
    return Module.load(path, threads)


def _class_for(manifest, plain):
    """The class of a network: ``plain``, or that of the kind of device that it was built for."""
    if manifest["target"].get("machine") == "cuda":
        from bnntvm.cuda.module import DeviceModule

        return DeviceModule
    return plain


def open_library(file, kind):
    """``kind(path)`` of the library that an open file begins with: :class:`bnntvm.runtime.Library`, or one like it."""
    # Through the descriptor that was verified, so that a file renamed over the path in between is not what gets loaded. The dynamic linker
    # takes a library whose *name* it has seen for the same library, and descriptor numbers come back: every load spells its name anew.
    spelling = format(next(_loads), "b").replace("0", "/").replace("1", "./")
    path = f"/proc/self/fd/{spelling}{file.fileno()}" if os.path.isdir("/proc/self/fd") else os.path.abspath(file.name)
    try:
        return kind(path)
    except BnnError:
        raise
    except Exception as error:
        raise ArtefactError(
            "the compiled library could not be loaded", where=file.name, why=_first_line(error), hint="build it again"
        ) from error


_loads = itertools.count(1)


def _infos(entries):
    return tuple(TensorInfo(entry["name"], tuple(entry["shape"]), entry["dtype"]) for entry in entries)


def _shape_text(shape):
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _convert(value, info):
    """``value`` as an array of the input's type, without loss; raises InputError. A copy only where the type changes."""
    want = np.dtype(info.dtype)
    if isinstance(value, np.ndarray) and value.dtype == want:
        return value
    typed = hasattr(value, "dtype") or hasattr(value, "__array_interface__") or hasattr(value, "__array__")
    try:
        array = np.asarray(value)
    except Exception as error:
        raise InputError(f"input {info.name!r} is not an array", why=_first_line(error), hint=f"give {info}") from error
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}.get(want.kind, want.kind)
    if not typed and (array.dtype.kind in kinds or want.kind == "f" and array.dtype.kind in "iu"):
        # Plain Python numbers have no width of their own: any that the type holds are fine.
        limits = np.iinfo(want) if want.kind in "iu" else None
        if limits is None or array.size == 0 or limits.min <= array.min() and array.max() <= limits.max:
            return array.astype(want)
    elif array.dtype.kind in kinds and np.can_cast(array.dtype, want, "safe"):
        return array if array.dtype.newbyteorder("=") == want else array.astype(want)
    raise InputError(
        f"input {info.name!r} has dtype {array.dtype}, the network takes {info.dtype}",
        hint=f"convert it yourself if that is what you mean: array.astype(numpy.{'bool_' if want.kind == 'b' else info.dtype})",
    )


def _check_shape(shape, info, sizes):
    """Compare with the declared shape. ``sizes`` collects name -> (size, input) of dynamic dimensions over all inputs."""

    def refuse(why, hint=None):
        raise InputError(
            f"input {info.name!r} has shape {_shape_text(shape)}, the network takes {_shape_text(info.shape)}", why=why, hint=hint
        )

    if len(shape) != len(info.shape):
        refuse(
            f"{len(shape)} dimensions instead of {len(info.shape)}",
            "a single image still needs its batch dimension" if len(shape) < len(info.shape) else None,
        )
    for axis, (got, want) in enumerate(zip(shape, info.shape)):
        if isinstance(want, int):
            if got != want:
                refuse(f"axis {axis} is {got} instead of {want}")
        elif got == 0:
            refuse(f"axis {axis} is 0: there is nothing to compute", "skip the call for an empty batch")
        else:
            size, other = sizes.setdefault(want or (info.name, axis), (got, info.name))
            if size != got:
                refuse(f"axis {axis}, {want!r}, is {got} here and {size} in input {other!r}")


def _check_finite(array, name):
    """Raise InputError for NaN or infinity."""
    if _surely_finite(array):
        return
    finite = np.isfinite(array)
    index = np.unravel_index(int(np.argmin(finite)), array.shape)
    raise InputError(
        f"input {name!r} is not finite: {array[index]} at {[int(i) for i in index]}",
        why=f"{array.size - int(finite.sum())} of {array.size} values are NaN or infinite",
        hint="run(feed, check_finite=False) if the network is meant to take them",
    )


def _surely_finite(array):
    """Whether no element is NaN or infinite.

    A sum of squares tells for float32, and nothing reads an array faster than the dot product. It goes piece by piece: BLAS libraries
    share longer ones among threads of their own. Where squares overflow, the extremes decide; NaN is the maximum of whatever it is in.
    """
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        for start in range(0, flat.size, _DOT_LENGTH):
            piece = flat[start : start + _DOT_LENGTH]
            with np.errstate(over="ignore"):
                finite = math.isfinite(piece.dot(piece))
            if not finite:
                break
        else:
            return True
    return math.isfinite(np.maximum.reduce(flat)) and math.isfinite(np.minimum.reduce(flat))


def _check_override(name, value, compiled):
    """An initializer that is also a graph input was compiled in; a feed may repeat it, not change it."""
    array = np.asarray(value)
    little = np.dtype(compiled["dtype"]).newbyteorder("<")
    same = array.dtype.newbyteorder("<") == little and array.shape == tuple(compiled["shape"])
    plain = np.ascontiguousarray(array, little) if same else None
    if not same or hashlib.sha256(plain.tobytes()).hexdigest() != compiled["sha256"]:
        raise InputError(
            f"{name!r} is a constant of the compiled network and the feed gives another value",
            why="an input with a default value was compiled in as that value",
            hint="leave it out of the feed; to change it, change the model's initializer and build again",
        )


def _as_declared(array, dtype, own):
    """A result as what the network declares. ``own``: nobody else has its memory."""
    if array.dtype != dtype:
        with np.errstate(over="ignore"):  # float16 outputs round to infinity where ONNX Runtime's would
            return array.astype(dtype)
    return array if own and array.flags.writeable else array.copy()
