"""Measuring on boards: TVM's RPC tracker hands out its servers, each measures one candidate at a time.

A farm is one tracker and any number of boards under one key::

    python -m tvm.exec.rpc_tracker --port 9190              # once
    bnntvm rpc-server --tracker HOST:9190 --key rpi4b       # on every board

Several tuners may share a farm: the tracker queues their requests. What TVM 0.27 lacks and is added here:

* A board that vanishes (power, network) while it measures loses its candidate: TVM's RPCRunner reports it as an error of the candidate.
  Here it is measured again elsewhere, and only a candidate that three boards lost counts as one that crashes.
* TVM's server stops serving when a candidate crashes its session (an exception ends the thread that listens): see
  :mod:`bnntvm.remote.server`.
"""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import Future

from tvm.support.popen_pool import PopenPoolExecutor

from bnntvm.errors import BnnError
from bnntvm.remote.client import boards, parse_address
from bnntvm.tuning import worker
from bnntvm.tuning.measure import Backlog, Measures, Process, Stopped
from bnntvm.tuning.worker import Failure

#: Boards that may lose a candidate before it is taken for one that crashes them.
ATTEMPTS = 3
#: Times that a board may be unreachable before a candidate is given up: the tracker hands out boards that have just died.
UNREACHABLE = 20
#: Seconds of one session on a board, and until a board, which may be busy for others, must have answered.
SESSION_LIMIT, ANSWER_LIMIT = 30, 120
#: Seconds that a candidate is measured for.
SECONDS = 0.1


def _session(address, key):
    from tvm import rpc

    return rpc.connect_tracker(*address).request(key, session_timeout=SESSION_LIMIT)


def _load(session, library):
    session.upload(library)
    return session.load_module(os.path.basename(library))


class There(worker.Here):
    """Where a candidate runs: a board. With a server of TVM's own memory has no guards and caches stay warm."""

    def __init__(self, session):
        self.device = session.cpu()
        try:
            self.reserve, self.seal, self.fault = (session.get_function(f"bnntvm.tuning.{name}") for name in ("place", "seal", "fault"))
            self.between = "bnntvm.tuning.between"
        except Exception:  # noqa: BLE001  (TVM's RPC errors have no common base)
            self.reserve, self.seal, self.fault, self.between = self._plain, tuple, str, ""

    def _plain(self, _role, dtype, *shape):
        import tvm

        return tvm.runtime.empty(shape, dtype, self.device)


def measure_there(address, key, folder, library):
    """Check and time one candidate on a board: ``("measured", seconds)``, ``("failed", why)`` or ``("unreachable", why)`` if no session
    began. Raises if the board is lost."""
    return _there(address, key, lambda session: worker.check_and_time(_load(session, library), There(session), folder, library, SECONDS))


def compare_there(address, key, candidates):
    """Time candidates in turns on one board."""

    def work(session):
        return worker.take_turns([(_load(session, library), folder, library) for folder, library in candidates], There(session), SECONDS)

    return _there(address, key, work)


def _there(address, key, work):
    try:
        session = _session(address, key)
    except Exception as error:  # noqa: BLE001  (TVM's RPC errors have no common base)
        time.sleep(0.2)  # the tracker needs a moment to forget a dead board
        return "unreachable", str(error)
    try:
        return "measured", work(session)
    except Failure as failure:
        return "failed", str(failure)
    except Exception as error:  # TVM's RPC errors have no common base
        if "RPCSessionTimeoutError" in str(error):
            return "failed", f"time out after {SESSION_LIMIT} s"
        raise ConnectionError(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__) from None


class Farm(Measures):
    """Measures on all boards of a key.

    Parameters
    ----------
    tracker : str
        "host:port".
    key : str
    threads : int
        Threads of the kernels; boards are started with so many.
    """

    place = "board"

    def __init__(self, tracker, key, threads):
        if not key:
            raise BnnError("which boards?", hint="give the key under which they are registered with the tracker")
        self.address, self.key, self.threads = parse_address(tracker), key, threads
        self.build_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        count = len(boards(self.address, key))
        if not count:
            raise BnnError(
                "the tracker has no board of this key", where=key, hint=f"on each board: bnntvm rpc-server --tracker {tracker} --key {key}"
            )
        self.machine, self.lost = f"boards {key}", 0
        self.backlog = Backlog()
        self.builder = Process(self.build_cores, 1, self.backlog)
        # One process for each board: a board that falls silent is given up by ending the process that waits for it.
        self.pool = PopenPoolExecutor(count, timeout=ANSWER_LIMIT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def measure(self, folder, library):
        """Future of the seconds of single runs."""
        return self._submit(measure_there, folder, library)

    def compare(self, candidates):
        """Future of the seconds of single runs of several candidates, taken in turns on one board."""
        return self._submit(compare_there, candidates)

    def _submit(self, function, *args):
        result = Future()
        self._attempt(1, 0, result, function, args)
        return result

    def _attempt(self, number, unreachable, result, function, args):
        """Try the ``number``-th board that begins a session; ``unreachable`` ones did not."""

        def done(future):
            error = future.exception()
            if error is None:
                kind, value = future.result()
                if kind == "unreachable" and unreachable < UNREACHABLE:
                    self._attempt(number, unreachable + 1, result, function, args)
                elif kind == "unreachable":
                    result.set_exception(Stopped(f"no board can be reached: {value}"))
                else:
                    result.set_result(value) if kind == "measured" else result.set_exception(Failure(value))
                return
            self.lost += 1
            try:
                if not isinstance(error, (ConnectionError, TimeoutError, ChildProcessError)):
                    raise error
                if number < ATTEMPTS:
                    self._attempt(number + 1, unreachable, result, function, args)
                elif boards(self.address, self.key):
                    raise Failure(f"lost by {number} boards: {error}")
                else:  # not the candidate's fault
                    raise Stopped("no board is left")
            except BaseException as final:
                result.set_exception(final)

        self.pool.submit(function, self.address, self.key, *args).add_done_callback(done)

    def close(self):
        self.builder.close()
        self.pool.shutdown(wait=False)
