"""The other side of a board: load an artefact there, and run it like a module that is here.

::

    board = bnntvm.connect("localhost:9190", "rpi4b")
    module = board.load("quicknet.bnn")                 # or a bnntvm.Module that was built for the board's processor
    outputs = module.run({"images": images})            # everything of bnntvm.Module; arrays travel
    print(module.benchmark())                           # timed on the board
"""

from __future__ import annotations

import gc
import json
import pathlib
import socket
import tempfile
import time

import numpy as np

from bnntvm import artefact
from bnntvm.errors import BnnError
from bnntvm.module import Module, Timing

#: Seconds that a busy board is waited for.
PATIENCE_S = 60


def parse_address(text):
    """(host, port) from "host:port"."""
    host, separator, port = str(text).rpartition(":")
    if not separator or not port.isdigit():
        raise BnnError("the tracker's address is not host:port", where=str(text), hint="for example localhost:9190")
    return host or "localhost", int(port)


def boards(address, key):
    """Addresses of the boards that are registered under ``key``, busy ones too.

    Parameters
    ----------
    address : (str, int)
        The tracker's.
    """
    return [tuple(one["addr"]) for one in _summary(address)["server_info"] if one["key"] == f"server:{key}"]


def _summary(address):
    from tvm import rpc

    try:
        socket.create_connection(address, timeout=10).close()  # TVM's client would try again for a minute
        tracker = rpc.connect_tracker(*address)
        summary = tracker.summary()
        tracker.close()
    except (OSError, RuntimeError) as error:
        raise BnnError(
            "the RPC tracker does not answer", where=f"{address[0]}:{address[1]}", why=str(error),
            hint="start one: python -m tvm.exec.rpc_tracker --port 9190",
        ) from error  # fmt: skip
    return summary


def _wait_for_a_free_board(address, key):
    """TVM's client would wait for ever."""
    deadline = time.monotonic() + PATIENCE_S
    while not _summary(address)["queue_info"].get(key, {}).get("free"):
        gc.collect()  # a session of this process may be garbage that has not been collected yet
        if time.monotonic() > deadline:
            why, hint = f"for {PATIENCE_S} s", "a board serves one session at a time"
            raise BnnError("every board is busy", where=f"key {key}", why=why, hint=hint)
        time.sleep(0.1)


def connect(tracker, key):
    """A board of a tracker, for as long as the result lives.

    Parameters
    ----------
    tracker : str
        "host:port".
    key : str
        The name of the kind of board.

    Raises
    ------
    BnnError
        If no tracker answers, it has no such board, or none becomes free.
    """
    if not key:
        raise BnnError("which board?", hint="give the key under which it is registered with the tracker")
    from bnntvm.runtime import import_tvm_ffi

    import_tvm_ffi()
    from tvm import rpc

    address = parse_address(tracker)
    if not boards(address, key):
        raise BnnError(
            "the tracker has no board of this key", where=key, hint=f"on the board: bnntvm rpc-server --tracker {tracker} --key {key}"
        )
    _wait_for_a_free_board(address, key)
    try:
        session = rpc.connect_tracker(*address).request(key, max_retry=1, session_timeout=0)
    except Exception as error:  # TVM's RPC errors have no common base
        raise BnnError("no board could be reached", where=f"{tracker}, key {key}", why=_last_line(error)) from error
    return Board(session, f"{key} at {tracker}")


class Board:
    """A session on a board.

    Attributes
    ----------
    name : str
    machine : str or None
        Its architecture; None where the server is TVM's own, which does not tell.
    flags : frozenset of str
        Of its processor, as far as known.
    threads : int
        Threads of its kernels; 1 where unknown.
    """

    def __init__(self, session, name):
        self.session, self.name = session, name
        try:
            facts = json.loads(str(session.get_function("bnntvm.board.about")()))
        except Exception:  # noqa: BLE001  (a server of TVM's own)
            facts = {"machine": None, "flags": [], "threads": 1}
        self.machine, self.flags, self.threads = facts["machine"], frozenset(facts["flags"]), facts["threads"]

    def load(self, source):
        """Send an artefact to the board.

        Parameters
        ----------
        source : Module, str or pathlib.Path
            A module, perhaps built for another machine than this one, or a ``.bnn`` file.

        Returns
        -------
        RemoteModule

        Raises
        ------
        BnnError
            ArtefactError for a damaged file, TargetError where the board cannot run it.
        """
        if isinstance(source, Module):
            with tempfile.TemporaryDirectory(prefix="bnntvm-") as folder:
                path = pathlib.Path(folder, "network.bnn")
                source.export(path)
                return self.load(path)
        file, manifest, length = artefact.read(source, to_run=False)
        if self.machine is not None:
            try:
                artefact.check_machine(file, manifest, str(source), self.machine, self.flags, f"the board ({self.name})")
            except BaseException:
                file.close()
                raise
        return RemoteModule(file, manifest, length, self)

    def measure(self, plan, artefact_path, probe):
        """See :func:`bnntvm.profiling.measure.measure`; the files are sent there.

        Raises
        ------
        BnnError
            If the board's server is TVM's own, or the network fails there.
        """
        if self.machine is None:
            raise BnnError("this board cannot be profiled", where=self.name, why="its server is TVM's own", hint="start bnntvm rpc-server")
        names = {"artefact": "network.bnn", "probe": "probe.so"}
        for path, name in zip((artefact_path, probe), names.values()):
            self.upload(path.read_bytes(), name)
        try:
            return str(self.session.get_function("bnntvm.board.measure")(json.dumps(plan | {k: f"./{name}" for k, name in names.items()})))
        except Exception as error:  # TVM's RPC errors have no common base
            raise BnnError("the network could not be profiled there", where=self.name, why=_last_line(error)) from error

    def upload(self, data, name):
        """Write a file into the session's folder; returns the file's name there."""
        try:
            self.session.upload(bytearray(data), name)
        except Exception as error:  # TVM's RPC errors have no common base
            raise BnnError("the board does not take a file", where=self.name, why=_last_line(error)) from error
        return name

    def __repr__(self):
        return f"<bnntvm board {self.name}, {self.machine or 'unknown machine'}>"


class RemoteModule(Module):
    """A network on a board. It runs and is asked like a :class:`bnntvm.Module`; one caller at a time."""

    def __init__(self, file, manifest, length, board):
        super().__init__(file, manifest, length, threads=1)
        self.threads, self.board = board.threads, board
        self.remote_name = board.upload(file.read(), "network.so")
        self._idle.append(self._machine())

    def _machine(self):
        if self._idle:
            return self._idle.pop()
        try:
            return RemoteMachine(self.board.session, self.remote_name, self._manifest.get("entries", ["main"]))
        except Exception as error:
            raise BnnError("the board could not load the network", where=self.board.name, why=_last_line(error)) from error

    def benchmark(self, feed=None, repeat=None, warmup=5, against=None):
        """As :meth:`bnntvm.Module.benchmark`, timed by the board itself: without the arrays' way there and back."""
        if against is not None:
            raise BnnError("a board is measured alone", where="against=", hint="leave it out")
        arrays, single = self._match(self.random_feed() if feed is None else feed)
        machine = self._machine()
        try:
            times = machine.time([np.ascontiguousarray(a, e.staged) for a, e in zip(arrays, self._entries)], single, repeat, warmup)
        except Exception as error:  # TVM's RPC errors have no common base
            raise BnnError("the network failed on the board", where=self.board.name, why=_last_line(error)) from error
        self._idle.append(machine)
        return Timing.of([seconds * 1e3 for seconds in times])


class RemoteMachine:
    """A virtual machine on a board; what :class:`bnntvm.runtime.Machine` is here."""

    def __init__(self, session, name, entries):
        from tvm import relax

        self.device, self.entries = session.cpu(), entries
        self.vm = relax.VirtualMachine(session.load_module(name), self.device)

    def buffer(self, _index, shape, dtype):
        """Any memory will do for what is sent."""
        return np.empty(shape, dtype)

    def is_finite(self, _array):
        """Unknown: numpy looks itself."""
        return False

    def run_again(self, *_args):
        """There is no short way."""
        return None

    def run(self, arrays, _threads, single=False):
        """See :meth:`bnntvm.runtime.Machine.run`."""
        name = self._send(arrays, single)
        self.vm.invoke_stateful(name)
        return [np.array(tensor.numpy()) for tensor in self.vm.get_outputs(name)]

    def time(self, arrays, single, repeat, warmup):
        """Seconds of single runs."""
        name = self._send(arrays, single)
        once = self.vm.time_evaluator("invoke_stateful", self.device, number=1, repeat=max(1, warmup))(name).min
        repeat = repeat or max(10, min(10000, int(1 / max(once, 1e-7))))
        return list(self.vm.time_evaluator("invoke_stateful", self.device, number=1, repeat=repeat)(name).results)

    def _send(self, arrays, single):
        import tvm

        name = "main_1" if single and "main_1" in self.entries else "main"
        self.vm.set_input(name, *[tvm.runtime.tensor(np.ascontiguousarray(a), self.device) for a in arrays])
        return name


def _last_line(error):
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
